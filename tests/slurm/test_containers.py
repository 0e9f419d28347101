"""Container profiles and build files, as far as they can be checked without the container tools."""

import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from hpcssl.run_dir import RunDir
from slurm.backend import batch_script, profiles
from slurm.doctor import job

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "containers" / "Dockerfile").read_text()
DEFINITION = (ROOT / "containers" / "hpcssl.def").read_text()


def read_instructions():
    """Keyword and arguments of each instruction of the Dockerfile."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.M).replace("\\\n", " ")
    return [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]


def read_sections():
    """The lines of each section of the definition file; the header under an empty name."""
    sections, name = {}, ""
    for line in DEFINITION.splitlines():
        if line.startswith("%"):
            name = line[1:].strip()
        elif line.strip() and not line.lstrip().startswith("#"):
            sections.setdefault(name, []).append(line.strip())
    return sections


def docker_sources():
    return [word for keyword, text in read_instructions() if keyword == "COPY" for word in text.split()[:-1]]


def check_shell(script):
    return subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr


def test_the_dockerfile_has_known_instructions_and_shell_commands_that_parse():
    instructions = read_instructions()
    assert instructions[0] == ["FROM", "python:3.12-slim-bookworm"]
    assert {keyword for keyword, _ in instructions} <= {"FROM", "ENV", "WORKDIR", "COPY", "RUN"}
    assert [check_shell(text) for keyword, text in instructions if keyword == "RUN"] == [""]
    assert all("=" in word for keyword, text in instructions if keyword == "ENV" for word in shlex.split(text))


def test_the_definition_file_has_known_sections_and_shell_commands_that_parse():
    sections = read_sections()
    header = dict(line.split(": ", 1) for line in sections[""])
    assert header == {"Bootstrap": "docker", "From": read_instructions()[0][1]}  # the same base image in both files
    assert set(sections) == {"", "files", "post", "environment", "test"}
    assert [check_shell("\n".join(sections[name])) for name in ("post", "environment", "test")] == [""] * 3


def test_both_files_copy_the_same_and_nothing_else_reaches_the_build():
    copies = [line.split() for line in read_sections()["files"]]
    assert [target for _, target in copies] == [f"/opt/hpcssl/{source}" for source, _ in copies]
    sources = [source for source, _ in copies]
    assert sources == docker_sources()
    ignored = (ROOT / "containers" / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignored[0] == "*" and [line[1:] for line in ignored if line.startswith("!")] == sources
    install = [line for line in read_sections()["post"] if line.startswith("pip")]
    assert install and install[0] in DOCKERFILE  # the same packages in both images


@pytest.mark.full
def test_what_is_copied_is_enough_to_install_the_package(tmp_path):
    pytest.importorskip("setuptools")
    for name in docker_sources():
        source = ROOT / name
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, tmp_path / name, ignore=ignore) if source.is_dir() else shutil.copy(source, tmp_path)
    words = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "wheels", "."]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"slurm/clusters/pyxis.yaml", "slurm/doctor/probe.py", "hpcssl/recipes/digits_msf.yaml"} <= set(names)


def find_line(script, text):
    (line,) = [line for line in script.splitlines() if text in line]
    return shlex.split(line)


def test_with_pyxis_srun_starts_the_container_and_the_epilogue_runs_on_the_node(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    profile = profiles.load_profile("pyxis")
    script = batch_script.render(RunDir(tmp_path / "r"), "train", {"nodes": "2", "spare-nodes": "1"}, profile)
    words = find_line(script, "slurm.job.task")
    (image,) = [k for k, word in enumerate(words) if word.startswith("--container-image=")]
    (mounts,) = [word for word in words if word.startswith("--container-mounts=")]
    assert words[0] == "srun" and image < words.index("python3")
    assert words[words.index("python3") :][:3] == ["python3", "-m", "slurm.job.bootstrap"]
    assert all(1 <= mount.count(":") <= 2 for mount in mounts.partition("=")[2].split(","))
    assert {"/run/munge:/run/munge", "/usr/bin/scontrol:/usr/bin/scontrol:ro"} <= set(
        mounts.partition("=")[2].split(",")
    )
    assert find_line(script, "slurm.job.epilogue")[0] == profile.host_python
    assert profile.host_python in next(line for line in script.splitlines() if "slurm.job.step_nodes" in line)
    doctor = find_line(job.render_script(tmp_path, "0" * 16, {"nodes": "2"}, profile), "srun --export=ALL")
    assert doctor.index("--no-container-mount-home") < doctor.index("python3")


def test_with_apptainer_every_python_runs_in_the_container(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    profile = profiles.load_profile("apptainer")
    script = batch_script.render(RunDir(tmp_path / "r"), "train", {"nodes": "2"}, profile)
    assert find_line(script, "slurm.job.epilogue")[:2] == ["apptainer", "exec"]
    words = find_line(script, "slurm.job.task")
    assert words.index("apptainer") < words.index("hpcssl.sif") < words.index("python3")


def test_what_the_batch_script_imports_on_the_node_is_no_more_than_documented():
    code = (
        "import sys\nbefore = set(sys.modules)\nimport slurm.job.epilogue, slurm.job.step_nodes\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(*[name for name in new if name in ('torch', 'numpy', 'typer', 'rich', 'PIL', 'tqdm', 'sklearn')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
