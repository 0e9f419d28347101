"""Installation and import of the package: entry points, versions, dependencies."""

import configparser
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import hpcssl
from tests.printed import printed_error

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def setup():
    """The parsed setup.cfg."""
    parsed = configparser.ConfigParser()
    parsed.read(ROOT / "setup.cfg")
    return parsed


def entry_points(setup):
    """Return {program: (module, function)}."""
    lines = setup["options.entry_points"]["console_scripts"].strip().split("\n")
    programs = dict(line.split(" = ") for line in lines)
    return {name: tuple(target.split(":")) for name, target in programs.items()}


def test_two_builds_of_faiss_are_refused(monkeypatch):
    monkeypatch.setattr(hpcssl._metadata, "version", lambda name: {"faiss-cpu": "1.9", "faiss-gpu": "1.7"}[name])
    with pytest.raises(ImportError) as caught:
        hpcssl._refuse_two_faiss()
    error = printed_error(f"hpcssl: {caught.value}")
    assert error.what == "faiss" and "faiss-cpu 1.9" in error.got and "faiss-gpu 1.7" in error.got
    assert "pip uninstall -y faiss-cpu faiss-gpu" in error.fix


@pytest.mark.parametrize("installed", ["faiss-cpu", "faiss-gpu", None])
def test_one_build_of_faiss_or_none_is_accepted(monkeypatch, installed):
    def version(name):
        if name != installed:
            raise metadata.PackageNotFoundError(name)
        return "1.9"

    monkeypatch.setattr(hpcssl._metadata, "version", version)
    hpcssl._refuse_two_faiss()


def test_apex_is_pinned_to_a_commit_outside_the_metadata(setup):
    lines = (ROOT / "requirements-apex.txt").read_text().splitlines()
    (apex,) = [line for line in lines if not line.startswith("#")]
    assert re.fullmatch(r"apex @ git\+https://github\.com/NVIDIA/apex@[0-9a-f]{40}", apex)
    assert "@ git+" not in (ROOT / "setup.cfg").read_text(), "PyPI refuses packages that depend on a URL"


def test_every_command_prints_its_help(setup):
    for name, (module, function) in entry_points(setup).items():
        code = f"from {module} import {function} as main; main(['--help'])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0 and name in done.stdout, done.stderr


def test_status_cancel_and_logs_do_not_import_torch():
    """They must answer at once, on a login node too."""
    modules = "slurm.cli, slurm.manage.control, slurm.manage.status, slurm.backend.scheduler"
    code = f"import sys; import {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_version_is_defined_in_one_place(setup):
    assert setup["metadata"]["version"] == "attr: hpcssl.__version__"


@pytest.mark.parametrize("program", ["hpcssl", "hpcssl-submit", "hpcssl-shard"])
def test_every_command_prints_its_version(setup, program):
    module, function = entry_points(setup)[program]
    code = f"from {module} import {function} as main; main(['--version'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, f"{program} {hpcssl.__version__}\n"), done.stderr


def test_a_clone_does_not_shadow_an_editable_install(tmp_path, setup):
    """From the parent of a clone named hpcssl, the installed package is imported, not the clone as a namespace."""
    assert setup["options"]["package_dir"].strip() == "= .", (
        "an explicit path: the import hook of setuptools is searched too late"
    )
    clone, site = tmp_path / "hpcssl", tmp_path / "site"
    (clone / "hpcssl").mkdir(parents=True)
    (clone / "hpcssl" / "__init__.py").write_text("")
    site.mkdir()
    (site / "__editable__.hpcssl.pth").write_text(f"{clone}\n")  # written by an editable install
    code = f"import site; site.addsitedir({str(site)!r}); import hpcssl; print(hpcssl.__file__)"
    # -S: without the site-packages of this environment, where hpcssl itself may be installed in the same way
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={"PATH": os.environ["PATH"]})
    assert done.stdout.strip() == str(clone / "hpcssl" / "__init__.py"), done.stderr


@pytest.mark.parametrize(
    ("package", "program", "function"),
    [("slurm", "hpcssl-submit", "submit_main"), ("data_prep", "hpcssl-shard", "shard_main")],
)
def test_an_unrelated_package_of_the_same_name_is_refused(tmp_path, package, program, function):
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("")
    code = f"from hpcssl.cli_runner import {function} as main; main(['--help'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )
    error = printed_error(done.stderr)
    assert (done.returncode, error.program, error.what) == (2, program, f"package {package}")
    assert str(tmp_path / package) in error.got + error.fix and str(ROOT / package) in error.got + error.expected
