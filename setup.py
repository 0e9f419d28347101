"""The optional decoder in C. Everything else about the package is in setup.cfg.

It is built where a C compiler and the headers of libjpeg-turbo are found. Where they are not, pip prints a warning with
-v and goes on: hpcssl works without it, and decodes images more slowly.
"""

from setuptools import Extension, setup

FOLDER = "hpcssl/data/native"

setup(
    ext_modules=[
        Extension(
            "hpcssl.data.native._views",
            [f"{FOLDER}/views.c", f"{FOLDER}/resize.c"],
            depends=[f"{FOLDER}/resize.h"],
            libraries=["jpeg"],
            # the weights must not depend on whether the compiler fuses multiplications and additions
            extra_compile_args=["-O3", "-ffp-contract=off", "-fvisibility=hidden"],
            optional=True,
        )
    ]
)
