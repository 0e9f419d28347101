"""A file imports only from lower floors, or from its own folder without a circle (imports inside functions too)."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

FLOORS = {
    "hpcssl": 0,  # __init__: the version
    "hpcssl.errors": 0, "hpcssl.door": 0, "hpcssl.rng": 0, "hpcssl.files": 0, "hpcssl.signals": 0,
    "hpcssl.launch": 0, "hpcssl.devices": 0, "hpcssl.world": 0, "hpcssl.journal": 0, "hpcssl.pulse": 0,
    "hpcssl.diagnosis": 0, "hpcssl.straggler": 0, "hpcssl.arrivals": 0,
    "hpcssl.config": 1,
    "hpcssl.data": 2, "hpcssl.views": 2, "hpcssl.published": 2,
    "hpcssl.nets": 3, "hpcssl.memory": 3, "hpcssl.optim": 3,
    "hpcssl.methods": 4,
    "hpcssl.train": 5, "hpcssl.recipes": 5,
    "hpcssl.evals": 6,
    "hpcssl.results": 7,
    "hpcssl.run": 8, "hpcssl.cli": 8, "hpcssl.__main__": 8,
    "data_prep": 8, "slurm": 8,
}
PACKAGES = ("hpcssl", "slurm", "data_prep")
# Two folders of one floor whose files use each other, without a circle: the loader cuts views, which borrow its memory.
FLOOR_MATES = {"hpcssl.data", "hpcssl.views"}
# The second package's files see only these of the first; slurm reaches higher inside functions, when a job runs.
# The decoder is among these, so that what is computed from an image is turned upright as the image will be.
DATA_PREP_SEES = {"hpcssl", "hpcssl.data.shards", "hpcssl.data.decode", "hpcssl.errors", "hpcssl.files", "hpcssl.rng",
                  "hpcssl.door"}
SLURM_TOP = 1


def modules():
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield name.removesuffix(".__init__"), path


NAMES = {name for name, _ in modules()}


def floor(name):
    parts = name.split(".")
    while parts:
        if ".".join(parts) in FLOORS:
            return FLOORS[".".join(parts)]
        parts.pop()
    raise AssertionError(f"{name} stands on no floor: add it to FLOORS")


def imports(path, *, top_only=False):
    """Modules of the three packages that a file imports; TYPE_CHECKING blocks included."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [name if name in NAMES else node.module for name in full]
        else:
            continue
        yield from (name for name in found if name.split(".")[0] in PACKAGES)


def test_every_file_imports_downwards():
    wrong = []
    for name, path in modules():
        for other in imports(path, top_only=name == "hpcssl"):  # its lazy attribute may reach up
            near = folder(name) == folder(other) or {folder(name), folder(other)} == FLOOR_MATES
            if name.split(".")[0] == "hpcssl" and other.split(".")[0] != "hpcssl":
                wrong.append(f"{name} imports {other}: hpcssl knows neither slurm nor data_prep")
            elif floor(other) > floor(name) or (floor(other) == floor(name) and 0 < floor(name) < 8 and not near):
                wrong.append(f"{name} (floor {floor(name)}) imports {other} (floor {floor(other)})")
    assert not wrong, "\n".join(wrong)


def folder(name):
    return ".".join(name.split(".")[:2])


def test_no_circle():
    graph = {name: {o for o in imports(path, top_only=True) if o in NAMES and o != name} for name, path in modules()}
    done, open_ = set(), []

    def visit(name):
        assert name not in open_, "circle: " + " → ".join([*open_[open_.index(name):], name])
        if name in done:
            return
        open_.append(name)
        for other in graph[name]:
            visit(other)
        done.add(open_.pop())

    for name in graph:
        visit(name)


def test_data_prep_and_slurm_see_little_of_hpcssl():
    wrong = [f"{name} imports {other}" for name, path in modules() if name.startswith("data_prep")
             for other in imports(path) if other.startswith("hpcssl") and other not in DATA_PREP_SEES]
    wrong += [f"{name} imports {other} at its top" for name, path in modules() if name.startswith("slurm")
              for other in imports(path, top_only=True) if other.startswith("hpcssl") and floor(other) > SLURM_TOP]
    assert not wrong, "\n".join(wrong)


def test_evals_know_no_training():
    wrong = [f"{name} imports {other}" for name, path in modules() if name.startswith("hpcssl.evals")
             for other in imports(path) if other.startswith(("hpcssl.train", "hpcssl.methods"))]
    assert not wrong, "\n".join(wrong)


def test_files_and_functions_stay_small():
    long = []
    for name, path in modules():
        text = path.read_text()
        if len(text.splitlines()) > 350:
            long.append(f"{name}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno > 75:
                long.append(f"{name}.{node.name}: {node.end_lineno - node.lineno} lines")
    assert not long, "\n".join(long)


def test_method_files_fit_a_page_or_two_and_inherit_nothing():
    for path in (ROOT / "hpcssl" / "methods").glob("*.py"):
        if path.stem in ("__init__", "base", "equations", "diagnostics"):
            continue
        text = path.read_text()
        assert len(text.splitlines()) <= 120, f"{path.name} is longer than 120 lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                assert not node.bases, f"{path.name}: {node.name} inherits"
