"""``python -m hpcssl`` is the same as ``hpcssl``."""

from hpcssl.cli import main

main()
