"""Habits that reviews forget: patterns that must not appear, with the files that may have them, and retired words."""

from __future__ import annotations

import configparser
import re
from functools import cache
from pathlib import Path

import pytest

from hpcssl.evals.renames import SECTION_RENAMES
from hpcssl.train.options import RENAMES

ROOT = Path(__file__).resolve().parents[1]
THIS = Path(__file__).relative_to(ROOT).as_posix()
PACKAGES = ("hpcssl", "slurm", "data_prep")
TEXT_SUFFIXES = {".py", ".md", ".yaml", ".toml", ".cfg"}

FORBIDDEN: dict[str, tuple[str, ...]] = {  # pattern: files in which it may appear
    r"\.cuda\(": (),  # code with a fixed device cannot be tested without that device
    r"torch\.manual_seed|np\.random\.seed|random\.seed\(": (),  # random numbers come from hpcssl/rng.py, by key
    r"import random\b|from random import": (),
    r"builtins\.": (),
    r"ArgumentParser|argparse": ("hpcssl/nets/unpack.py",),  # the name of a class in the checkpoints of others
    r"weights_only=False|pickle\.load": (),
    r"shell=True|os\.system\(": (),
    r"torch\.distributed|import distributed": (
        "hpcssl/distributed/collectives.py",
        "hpcssl/distributed/key_value_store.py",
        "hpcssl/distributed/rendezvous.py",
        "hpcssl/distributed/world.py",
    ),
    r"^\s*print\(": (
        "data_prep/cli.py",
        "data_prep/cli_images.py",
        "hpcssl/cli/encoder.py",
        "hpcssl/cli/inference.py",
        "hpcssl/cli/tables.py",
        "hpcssl/cli/train.py",
        "hpcssl/cli_runner.py",
        "slurm/cli.py",
        "slurm/demo.py",
        "slurm/doctor/cli.py",
        "slurm/job/epilogue.py",  # a job's standard output is its log
        "slurm/job/task.py",
        "slurm/sweep/cli.py",
    ),
    r"except( Exception)?:\s*pass": (),
}

SPELLING = {  # British: American
    r"analys(ed|er|ing)": "analyze",
    r"artefacts?": "artifact",
    r"behaviours?": "behavior",
    r"catalogues?": "catalog",
    r"centred?|centres|centring": "center",
    r"colour\w*": "color",
    r"defence": "defense",
    r"favour\w*": "favor",
    r"grey": "gray",
    r"honour\w*": "honor",
    r"judgement": "judgment",
    r"labell(ed|ing)|unlabelled": "labeled",
    r"licence": "license",
    r"(re)?model(led|ling)": "modeled",
    r"misspelt": "misspelled",
    r"neighbour\w*": "neighbor",
    r"(un|de|re)?(initial|normal|optim|serial|organ|recogn|summar|minim|maxim|util|synchron|parallel|random|general|regular|"
    r"visual|standard|real|final|special|custom|capital|categor|emphas|local|stabil|author|quant|vector|token)"
    r"is(e[sdr]?|ers?|ing|ations?)": "-ize, -ization",
}

TERMS = {  # retired word, in prose or in code: the standard term
    r"mend(s|ed|ing)?": "fix",
    r"ledgers?": "embedding table",
    r"puls(e|es)": "heartbeat",
    r"knock(s|ed|ing)?": "connect",
    r"doors?": "command, entry point",
    r"kin": "rows of the same image",
    r"twins?": "previous epoch, second modality, second view",
    r"honest(ly)?": "plain, original",
    r"told": "recorded, reported; as a value, the name of what it is",
    r"anew": "again; as a value, refill",
    r"take[ns]? back|taking back": "undo",
    r"tell(s|ing)? (each|one another|the others)": "exchange, report",
    r"cannot be meant": "invalid",
    r"to be meant": "deliberate",
    r"taken up again": "resumed, rolled back",
    r"(goes|go) on there": "no action needed",
    r"ours alone|theirs alone": "private",
    r"last words": "report of the failure",
    r"got [^;()]{1,80}; expected": "got ... (expected ...). Fix: ...",
}

NAMES = {  # retired name in code: the name of today
    r"def aim|\.aim": "targets",
    r"def agree|\.agree": "loss",
    r"Emb": "Embedding",
    r"class (Hits|Near)": "Neighbors, ConstrainedNeighbors",
    r"class Heads": "HeadSpec",
    r"class Scene": "MemoryContext",
    r"class Remembering": "StateHooks",
    r"class (Pair|Branch)": "EncoderPair, Encoder",
    r"Ticket|ticket": "PushUndo",
    r"take_back": "undo",
    r"still_steps": "frozen_steps",
    r"pos_B": "rows_B",
    r"watch_labels": "has_labels",
    r"in_batch": "needs_whole_batch",
    r"def (follow|settle|settled)|\.settle": "update_ema, normalize_prototypes",
    r"embed_now": "embed_without_grad",
    r"norms_of|why_not": "find_norms, explain_invalid_group",
    r"(World|world)\.(alone|tell|maximum|deal|part)": "single_process, broadcast_text, all_reduce_max, BatchLayout",
    r"\.gather_text|def gather_text": "all_gather_text",
    r"gather_grad": "all_gather_with_grad",
    r"\.whole_batch|def whole_batch|part_of_batch": "all_gather_rows, local_batch_rows",
    r"\.on_main|def on_main": "run_on_main",
    r"Pulse": "Heartbeat",
    r"Beat": "HeartbeatRecord",
    r"class Board": "KeyValueStore",
    r"who_is_gone|last_words": "explain_collective_error, report_failure",
    r"refuse_strangers": "announcement",
    r"KNOCK_S": "CONNECT_S",
    r"class (Feed|Damage|Loss|Damaged)": "DataPipeline, DamageLog, DamagedSample, DamagedImageError",
    r"def too_many": "damage_limit_error",
    r"own_folder": "make_private_folder",
    r"newest_valid|none_whole|cut_back": "latest_valid, describe_skipped, truncate_after",
    r"digest_of(?!_)": "sha256_of_file, index_digest, checkpoint_digest",
    r"LineFile": "JsonLinesWriter",
    r"os_parts": "os_error_parts",
    r"BY_HAND": "INTERACTIVE",
    r"class (Draws|Sequential)": "SupportOrder, SequentialOrder",
    r"class (Augment|Pairs)": "Augmentation, MixPairing",
    r"def (one_way|both_ways|side_by_side)": "one_way_plan, symmetric_plan, join_plans",
    r"look_up": "find_positives; lookup",
    r"class (Twins|Groups|Aim|Modalities|Pseudo)": "TwoQueuesRule, ClusterAssignments, CmsfTargets, ...",
    r"need_faiss": "require_faiss",
    r"KnnWatch": "OnlineKnn",
    r"class (Tuning|Tuner|Pictures|Maps|Among)": "FinetuneProtocol, FinetuneTrainer, DetectionShards, ...",
    r"as_error": "as_eval_error",
    r"low_shot": "fit_low_shot",
    r"class Verdict": "RetryDecision",
    r"out_of_time": "time_limit_reached",
    r"ours_alone": "private_umask",
    r"def (left_over|this_attempt|take_over)": "remaining_steps, describe_attempt, submit_successor",
}

FORMER_KEYS = RENAMES.keys | {f"evals.{former}": f"evals.{key}" for former, key in SECTION_RENAMES.keys.items()}
KEYS = {  # former recipe key: the key of today
    rf"(?<![./]){re.escape(former)}(?!\()": key for former, key in FORMER_KEYS.items() if "." in former
}

# Where a retired word must stay: the tables of former keys and their tests, and keys of random numbers, since another
# key would draw other numbers.
EXEMPT_FILES = {THIS, "hpcssl/evals/renames.py", "tests/ground/test_renamed_keys.py", "tests/ground/test_commands.py"}
EXEMPT_TABLE = re.compile(r"^RENAMES = Renames\(.*?^\)", re.M | re.S)
EXEMPT_STRINGS = {
    "hpcssl/memory/ring_buffer.py": '"twin"',
    "hpcssl/methods/cmsf/pseudo_labels.py": '"labelled"',
    "hpcssl/methods/neighbors.py": '"neighbour"',
    "tests/evals/test_run.py": '"evals.knn.tau"',
}


@cache
def read_texts() -> dict[str, str]:
    """The text of packages, recipes, documentation, benchmarks and tests by file name, without the exemptions."""
    folders = [*PACKAGES, "benchmarks", "docs", "tests"]
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in TEXT_SUFFIXES]
    paths += [ROOT / name for name in ("README.md", "RESULTS.md", "CONTRIBUTING.md", "Makefile", "setup.cfg")]
    texts = {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted(paths)}
    texts = {name: text for name, text in texts.items() if name not in EXEMPT_FILES and "/_build/" not in name}
    for name, string in EXEMPT_STRINGS.items():
        assert string in texts[name], f"{name} no longer needs its exemption"
        texts[name] = texts[name].replace(string, '""')
    options = "hpcssl/train/options.py"
    texts[options] = EXEMPT_TABLE.sub(lambda table: "\n" * table.group().count("\n"), texts[options])
    return texts


def find_retired(table: dict[str, str], texts: dict[str, str], flags: int = 0) -> list[str]:
    """Lines with a retired word, which must be whole words, and the term to use instead."""
    any_word = re.compile("|".join(rf"\b(?:{pattern})(?!\w)" for pattern in table), flags)
    found = []
    for name, text in texts.items():
        for match in any_word.finditer(text):
            number = text.count("\n", 0, match.start()) + 1
            line = text.splitlines()[number - 1].strip()
            term = next(term for pattern, term in table.items() if re.fullmatch(pattern, match.group(), flags))
            found.append(f"{name}:{number}: write {term}: {line}")
    return found


@pytest.mark.parametrize("pattern", FORBIDDEN)
def test_pattern_appears_only_where_allowed(pattern):
    lines = [
        (name, number, line)
        for name, text in read_texts().items()
        if name.startswith(PACKAGES) and name.endswith(".py") and name not in FORBIDDEN[pattern]
        for number, line in enumerate(text.splitlines(), 1)
    ]
    found = [line for line in lines if re.search(pattern, line[2]) and not line[2].lstrip().startswith("#")]
    assert found == []


@pytest.mark.parametrize(("table", "flags"), [(SPELLING, re.I), (TERMS, re.I), (NAMES, 0), (KEYS, 0)])
def test_retired_words_do_not_come_back(table, flags):
    assert find_retired(table, read_texts(), flags) == []


@pytest.mark.parametrize(("table", "flags"), [(SPELLING, re.I), (TERMS, re.I), (NAMES, 0), (KEYS, 0)])
def test_no_term_to_use_is_retired(table, flags):
    terms = {f"term {number}": term for number, term in enumerate(table.values())}
    assert find_retired(table, terms, flags) == []


def test_retired_words_are_found():
    texts = {"a.py": "x = 1\n# Normalisation of the Neighbour, coloured\nmodel.aim(optim.lr_per, in_batch_loss)\n"}
    assert [line.split(": ")[1] for line in find_retired(SPELLING, texts, re.I)] == [
        "write -ize, -ization",
        "write neighbor",
        "write color",
    ]
    assert len(find_retired(NAMES, texts)) == len(find_retired(KEYS, texts)) == 1
    assert find_retired(TERMS, {"b.md": "Mending the Twin doors; a kind of knockout"}, re.I)[1].startswith("b.md:1")
    assert len(find_retired(TERMS, {"b.md": "Mending the Twin doors; a kind of knockout"}, re.I)) == 3


def test_no_package_is_shadowed_by_tests():
    assert list((ROOT / "tests").rglob("__init__.py")) == []  # a package tests/slurm would shadow slurm


def test_dependencies_have_their_reason():
    text = (ROOT / "setup.cfg").read_text()
    setup = configparser.ConfigParser()
    setup.read_string(text)
    for line in setup["options"]["install_requires"].split("\n"):
        name = re.split(r"[<>=\[ ]", line.strip())[0]
        if name:
            assert re.search(rf"^#.*\b{re.escape(name)}\b", text, re.M), f"{name} has no reason in setup.cfg"
