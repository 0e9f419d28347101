"""A module imports only from lower layers, without cycles; folders, files and functions stay small."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("hpcssl", "slurm", "data_prep")

LAYERS = (  # the lowest first; a module belongs to the longest name listed here that it starts with
    "hpcssl hpcssl.errors hpcssl.rng hpcssl.signals hpcssl.storage",  # hpcssl alone means hpcssl/__init__.py
    "hpcssl.attempts hpcssl.files hpcssl.terminal hpcssl.recipes",
    "hpcssl.cli_runner hpcssl.code_version hpcssl.config hpcssl.config_docs hpcssl.json_lines hpcssl.run_dir",
    "hpcssl.timing hpcssl.tracking",
    "hpcssl.distributed.batch_layout hpcssl.distributed.key_value_store "
    "hpcssl.distributed.launch hpcssl.distributed.straggler",
    "hpcssl.distributed.liveness",
    "hpcssl.distributed",  # collectives, devices, rendezvous and world, which use the others
    "hpcssl.checkpoint hpcssl.journal hpcssl.optim hpcssl.published hpcssl.views",
    "hpcssl.data hpcssl.memory hpcssl.nets",
    "hpcssl.methods.base hpcssl.methods.checks hpcssl.methods.equations",
    "hpcssl.methods.diagnostics",
    "hpcssl.methods.cmsf",
    "hpcssl.methods",
    "hpcssl.train.attempt",
    "hpcssl.train",
    "hpcssl.evals.common",
    "hpcssl.evals.checks hpcssl.evals.context hpcssl.evals.renames",
    "hpcssl.evals.detection hpcssl.evals.linear",
    "hpcssl.evals.finetune hpcssl.evals.frozen",
    "hpcssl.evals",  # options, registry, resolve, rows, run and online_knn, which know all evaluations
    "hpcssl.results hpcssl.preparation",
    "hpcssl.report",
    "hpcssl.inference",
    "hpcssl.run",
    "hpcssl.planning hpcssl.preparation.branches",
    "hpcssl.api",
    "hpcssl.cli",
    "hpcssl.__main__",
    "data_prep data_prep.catalog data_prep.cli_options",
    "data_prep.shards",
    "data_prep.sources",
    "data_prep.index data_prep.jobs",
    "data_prep.build data_prep.next_commands data_prep.pages data_prep.show data_prep.split data_prep.subset "
    "data_prep.verify",
    "data_prep.cli_images",
    "data_prep.cli",
    "data_prep.__main__",
    "slurm slurm.cli_options slurm.clusters slurm.command_line slurm.log",
    "slurm.backend",
    "slurm.manage",
    "slurm.job",
    "slurm.submission",
    "slurm.demo slurm.doctor slurm.submit",
    "slurm.api slurm.sweep slurm.top",
    "slurm.cli",
    "slurm.__main__",
)
LAYER_OF = {unit: number for number, units in enumerate(LAYERS) for unit in units.split()}

# What data_prep may import of hpcssl. The decoder is among it, so that whatever is computed from an image at this point
# is turned upright as the image will be.
DATA_PREP_IMPORTS = {
    "hpcssl",
    "hpcssl.cli_runner",
    "hpcssl.data.decode",
    "hpcssl.data.image_files.formats",
    "hpcssl.data.image_files.scan",
    "hpcssl.data.shards",
    "hpcssl.errors",
    "hpcssl.files",
    "hpcssl.rng",
    "hpcssl.storage.npy",
    "hpcssl.terminal.help_pages",
}
# The highest layer that slurm imports at the top of its modules: hpcssl-submit starts without torch. Functions that run
# inside a job import more.
SLURM_TOP_LAYER = LAYER_OF["hpcssl.distributed.launch"]

MAX_FILES, MAX_LINES, MAX_FUNCTION_LINES, MAX_METHOD_LINES = 15, 300, 60, 120
# Modules of hpcssl/methods that hold no method.
NO_METHOD = ("__init__", "base", "equations", "diagnostics", "pseudo_labels", "neighbors")


class Import(NamedTuple):
    """One import: the importing module, the imported one, and where the statement stands.

    Attributes:
        module: the module with the statement.
        other: the module that it imports.
        top: whether the statement runs when the module is imported, rather than inside a function.
        typing_only: whether it stands under ``if TYPE_CHECKING:``, where it never runs.
    """

    module: str
    other: str
    top: bool = True
    typing_only: bool = False


def list_modules() -> dict[str, Path]:
    """All modules of the three packages, by dotted name."""
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def read_imports(module: str, source: str, names: set[str]) -> Iterator[Import]:
    """The imports of one module from the three packages, those inside functions included."""
    tree = ast.parse(source)
    top = {id(node) for node in tree.body}
    typing_only = {
        id(node)
        for block in tree.body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            others = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            others = [name if name in names else str(node.module) for name in full]
        else:
            continue
        for other in others:
            if other.split(".")[0] in PACKAGES:
                yield Import(module, other, id(node) in top, id(node) in typing_only)


MODULES = list_modules()
IMPORTS = [found for name, path in MODULES.items() for found in read_imports(name, path.read_text(), set(MODULES))]


def unit_of(module: str) -> str:
    """The longest entry of LAYERS that a module starts with. The name of a package stands for its __init__ alone."""
    parts = module.split(".")
    for count in range(len(parts), 0, -1):
        unit = ".".join(parts[:count])
        if unit in LAYER_OF and (unit not in PACKAGES or unit == module):
            return unit
    raise AssertionError(f"{module} is in no layer: add it to LAYERS")


def find_upward(imports: list[Import]) -> list[str]:
    """Imports that lead neither to a lower layer nor to the same entry of LAYERS."""
    wrong = []
    for module, other, top, _ in imports:
        if module == "hpcssl" and not top:  # its lazy attribute may reach up
            continue
        below, above = unit_of(other), unit_of(module)
        if below != above and LAYER_OF[below] >= LAYER_OF[above]:
            wrong.append(f"{module} (layer {LAYER_OF[above]}) imports {other} (layer {LAYER_OF[below]})")
    return wrong


def find_cycle(imports: list[Import]) -> list[str]:
    """The modules of a cycle, the first one repeated at the end; empty if there is none.

    Imports inside functions count. Those under ``if TYPE_CHECKING:`` never run and do not.
    """
    graph: dict[str, set[str]] = {}
    for module, other, top, typing_only in imports:
        if module != other and not typing_only and (top or module != "hpcssl"):
            graph.setdefault(module, set()).add(other)
    finished: set[str] = set()
    path: list[str] = []

    def visit(module: str) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module not in finished:
            path.append(module)
            for other in sorted(graph.get(module, ())):
                if cycle := visit(other):
                    return cycle
            finished.add(path.pop())
        return []

    return next((cycle for module in sorted(graph) if (cycle := visit(module))), [])


def function_lengths(source: str) -> Iterator[tuple[str, int]]:
    """Name and number of lines of every function, from ``def`` to its last line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, int(node.end_lineno or 0) - node.lineno + 1


def test_every_module_imports_downwards():
    assert not find_upward(IMPORTS)


def test_there_is_no_cycle():
    assert not find_cycle(IMPORTS)


def test_every_layer_exists():
    assert [unit for unit in LAYER_OF if unit not in MODULES and not (ROOT / unit.replace(".", "/")).is_dir()] == []


def test_hpcssl_knows_neither_of_the_other_packages():
    upward = [i for i in IMPORTS if i.module.split(".")[0] == "hpcssl" and i.other.split(".")[0] != "hpcssl"]
    assert [i for i in upward if i.module != "hpcssl" or not i.typing_only] == []  # hpcssl.submit, for type checkers


def test_data_prep_and_slurm_do_not_know_each_other():
    assert [i for i in IMPORTS if {i.module.split(".")[0], i.other.split(".")[0]} == {"data_prep", "slurm"}] == []


def test_data_prep_imports_little_of_hpcssl():
    used = {i.other for i in IMPORTS if i.module.startswith("data_prep") and i.other.startswith("hpcssl")}
    assert used <= DATA_PREP_IMPORTS


def test_slurm_imports_no_torch_at_the_top():
    top = [i for i in IMPORTS if i.top and i.module.startswith("slurm") and i.other.startswith("hpcssl")]
    assert [i for i in top if LAYER_OF[unit_of(i.other)] > SLURM_TOP_LAYER] == []


def test_evaluations_know_no_training():
    reached = [i for i in IMPORTS if i.module.startswith("hpcssl.evals")]
    assert [i for i in reached if i.other.startswith(("hpcssl.train", "hpcssl.methods"))] == []


def test_folders_stay_small():
    counts = Counter(path.parent.relative_to(ROOT) for path in MODULES.values())
    assert {str(folder): count for folder, count in counts.items() if count > MAX_FILES} == {}


def test_files_stay_small():
    lengths = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


def test_functions_stay_small():
    lengths = [(n, f, lines) for n, path in MODULES.items() for f, lines in function_lengths(path.read_text())]
    assert [(name, function) for name, function, lines in lengths if lines > MAX_FUNCTION_LINES] == []


def test_method_files_fit_two_pages_and_inherit_nothing():
    for path in (ROOT / "hpcssl" / "methods").rglob("*.py"):
        if path.stem in NO_METHOD:
            continue
        text = path.read_text()
        assert len(text.splitlines()) <= MAX_METHOD_LINES, path.name
        bases = {node.name: node.bases for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef)}
        assert [name for name, inherited in bases.items() if inherited] == [], path.name


def test_these_checks_can_fail():
    up, down = Import("hpcssl.files", "hpcssl.run"), Import("hpcssl.run", "hpcssl.files")
    beside = Import("hpcssl.data.shards", "hpcssl.nets.resnet")  # two entries of one layer
    assert find_upward([down]) == [] and len(find_upward([up, down, beside])) == 2
    low, high = Import("slurm.job.task", "slurm.job.requeue", top=False), Import("slurm.job.requeue", "slurm.job.task")
    assert find_cycle([low]) == [] and len(find_cycle([low, high])) == 3
    assert find_cycle([low, high._replace(typing_only=True)]) == []
    source = "if TYPE_CHECKING:\n    from hpcssl import run\ndef f():\n    import slurm.cli\n    import torch\n"
    found = list(read_imports("m", source, set(MODULES)))
    assert found == [Import("m", "hpcssl.run", False, True), Import("m", "slurm.cli", False, False)]
    assert dict(function_lengths(source)) == {"f": 3}
