"""Runs that start from a weights file (``model.weights``) or from a checkpoint of another run (``--from``)."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import hpcssl.cli
import slurm.cli
from hpcssl import config, rng
from hpcssl import run as runs
from hpcssl.checkpoint.manager import checkpoint_digest
from hpcssl.checkpoint.reader import SavedCheckpoint
from hpcssl.errors import ConfigError, ResumeError
from hpcssl.files import read_lines
from hpcssl.memory import ring_buffer
from hpcssl.nets import resnet, weights
from hpcssl.nets.resnet import Arch
from hpcssl.preparation import branches
from hpcssl.run_dir import RunDir
from hpcssl.signals import StopFlag
from hpcssl.train import loop, recipe
from hpcssl.train.start import branch, initial_weights
from slurm.backend import code_snapshot, local
from tests.printed import printed_error
from tests.resume.conftest import BASE

FULL = pytest.mark.full
NETWORK = ["model.arch=resnet18", "model.stem=small", "model.projector.hidden=[32]", "model.predictor.hidden=[32]"]


@pytest.fixture
def train(shards, capsys):
    """train(*words) -> (exit code, stderr) of ``hpcssl train`` in this process; without ``--from``, a small run."""

    def run(*words, main=hpcssl.cli.main, verb=("train",)):
        values = [] if "--from" in words else [f"data.train={shards.root}", *BASE, "machine.keep_checkpoints=9"]
        with pytest.raises(SystemExit) as caught:
            main([*verb, *map(str, words[:1]), *values, *map(str, words[1:])])
        return caught.value.code, capsys.readouterr().err

    return run


def random_backbone(arch, seed=7):
    """A backbone with random weights and statistics."""
    network = resnet.build(arch)
    generator = rng.generator(seed)
    with torch.no_grad():
        for name, value in weights.backbone_tensors(network).items():
            value.copy_(torch.rand(value.shape, generator=generator) * 0.1 + (0.5 if "var" in name else 0))
    return network


@pytest.fixture(scope="module")
def own_file(tmp_path_factory):
    """Weights of resnet_tiny in the format of this project."""
    path, arch = tmp_path_factory.mktemp("weights") / "tiny.safetensors", Arch(arch="resnet_tiny", stem="small")
    about = {"mean": [0.5] * 3, "std": [0.5] * 3, "size": 16, "fingerprint": "", "step": None, "method": "test"}
    weights.save(path, random_backbone(arch), arch, **about)
    return path


def fail_at(monkeypatch, step):
    """Let the next attempt fail when it enters this step, as if it was killed there."""
    original = loop.launch_step

    def failing(training, *rest):
        if training.step == step:
            raise RuntimeError("the test ends this attempt")
        return original(training, *rest)

    monkeypatch.setattr(loop, "launch_step", failing)


def change_manifest(folder, change):
    """Change the manifest of a checkpoint, which stays whole."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    (folder / "manifest.json").write_text(json.dumps(body | {"sha256": config.fingerprint(body)}))


def test_a_run_whose_recipe_fails_newer_checks_is_continued(train, shards, tmp_path, monkeypatch):
    """Neither a check between keys nor validation shards that are gone stop it; evaluations can be added at its end."""
    run, val = tmp_path / "run", tmp_path / "val"
    shutil.copytree(shards.root, val)
    words = ["digits_msf", "--run", run, f"data.val={val}", "schedule.warmup_lr=9", "bank.size=64"]
    assert train(*words)[0] == 2, "a new run of this recipe is refused"
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "check_dependencies", lambda recipe: None)
        fail_at(patch, 3)
        assert train(*words)[0] == 1
    shutil.rmtree(val)
    code, printed = train(*words)
    assert code == 0, printed
    code, printed = train(*words, "optim.lr=9")
    assert code == 1 and "optim.lr" in printed_error(printed).got, "the recipe is still compared"
    monkeypatch.setattr(local, "launch", lambda run, options, *gpus: submitted.extend(options) or [])
    monkeypatch.setattr(code_snapshot, "create_snapshot", lambda run: None)
    submitted = []
    words = [f"data.val={shards.root}" if "data.val" in str(word) else word for word in words]
    code, printed = train(*words, "--local", "--evals", "knn", main=slurm.cli.main, verb=())
    assert code == 0 and submitted == ["knn"], printed


def test_random_rows_of_the_bank_are_drawn_only_where_there_is_no_checkpoint(train, tmp_path, monkeypatch):
    drawn, fill = [], ring_buffer.fill_randomly
    monkeypatch.setattr(ring_buffer, "fill_randomly", lambda rows, *place: drawn.append(rows) or fill(rows, *place))
    words = ["digits_msf", "--run", tmp_path / "run", "bank.size=64", "machine.checkpoint_steps=2"]
    with monkeypatch.context() as patch:
        fail_at(patch, 3)
        assert train(*words)[0] == 1
    assert [len(rows) for rows in drawn] == [64] and RunDir(tmp_path / "run").checkpoint(2).exists()
    code, printed = train(*words)
    assert code == 0 and "step-00000002" in printed and len(drawn) == 1, printed


# -- model.weights ------------------------------------------------------------------------------------------


def test_a_killed_run_with_weights_ends_with_the_same_bits(run_scenarios, own_file):
    """Killed before and after the first checkpoint. The first export equals the file, in the target encoder too."""
    kills = [{"kill_at": 1}, {"kill_at": 3}, {}]
    scenarios = [
        {"name": name, "recipe": "digits_msf", "worlds": [2], "attempts": attempts, "overrides": overrides}
        for name, attempts, overrides in (
            ("undisturbed", [{}], [f"model.weights={own_file}"]),
            ("killed", kills, [f"model.weights={own_file}"]),
        )
    ]
    results = run_scenarios(scenarios)
    for result, _ in results.values():
        assert result["done"], result["log"]
    assert results["killed"][0]["digest"] == results["undisturbed"][0]["digest"]
    assert [any(code == -9 for code in codes) for codes in results["killed"][0]["codes"]] == [True, True, False]
    theirs = load_file(own_file)
    for name in ("undisturbed", "killed"):
        exported = load_file(RunDir(results[name][1]).weights_at(0))
        assert exported.keys() == theirs.keys()
        assert all(torch.equal(exported[key], theirs[key]) for key in theirs)


def test_the_target_encoder_starts_as_a_copy(train, own_file, tmp_path, monkeypatch):
    seen = {}

    def record(training, *rest):
        seen.update({name: tensor.clone() for name, tensor in training.pair.target.state_dict().items()})
        raise RuntimeError("the test ends this attempt")

    monkeypatch.setattr(loop, "launch_step", record)
    train("digits_msf", "--run", tmp_path / "run", f"model.weights={own_file}")
    theirs = load_file(own_file)
    assert all(torch.equal(seen[key], theirs[key]) for key in theirs)


@pytest.mark.full
@pytest.mark.parametrize("layout", ["torchvision", "run"])
def test_other_layouts_and_runs(train, own_file, tmp_path, layout, monkeypatch):
    """A state dict of torchvision; and a run folder, whose newest export is taken, also when it has a newer one."""
    if layout == "torchvision":
        network = random_backbone(Arch(arch="resnet18", stem="small"))
        source, network_values = tmp_path / "resnet18.pth", NETWORK
        torch.save(network.state_dict(), source)
        expected = weights.backbone_tensors(network)
    else:
        source, network_values = tmp_path / "source", []
        assert train("digits_msf", "--run", source)[0] == 0
        expected = load_file(RunDir(source).weights_at(6))
    words = ["digits_msf", "--run", tmp_path / "run", *network_values, f"model.weights={source}"]
    with monkeypatch.context() as patch:
        fail_at(patch, 0)  # the first export comes before
        train(*words)
    exported = load_file(RunDir(tmp_path / "run").weights_at(0))
    prefix = weights.PREFIX if layout == "torchvision" else ""
    assert all(torch.equal(exported[prefix + key], expected[key]) for key in expected)
    if layout == "run":
        (source / "weights" / "step-00000009.safetensors").write_bytes(own_file.read_bytes())
        assert train(*words)[0] == 0, "the file that was the newest when the run was started"


@pytest.mark.full
def test_the_content_of_the_file_counts_and_not_its_path(train, own_file, tmp_path, monkeypatch):
    """Another file is refused, a moved one is not, and a run with a checkpoint needs none. Before that it does."""
    run, file, moved = tmp_path / "run", tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    shutil.copy(own_file, file)
    words = ["digits_msf", "--run", run]
    with monkeypatch.context() as patch:
        fail_at(patch, 1)
        assert train(*words, f"model.weights={file}")[0] == 1
    file.rename(moved)
    error = printed_error(train(*words, f"model.weights={file}")[1])
    assert error.what == "model.weights" and "checkpoint" in error.fix
    with monkeypatch.context() as patch:
        fail_at(patch, 5)  # the checkpoint of step 2 is complete when that of step 4 is begun
        assert train(*words, f"model.weights={moved}")[0] == 1
    moved.unlink()
    other, arch = tmp_path / "other.safetensors", Arch(arch="resnet_tiny", stem="small")
    about = {"mean": [0.5] * 3, "std": [0.5] * 3, "size": 16, "fingerprint": "", "step": None, "method": "test"}
    weights.save(other, random_backbone(arch, seed=8), arch, **about)
    code, printed = train(*words, f"model.weights={other}")
    assert code == 1 and "model.weights_sha256" in printed_error(printed).got
    code, printed = train(*words, "machine.loader_threads=2")
    assert code == 1 and "model.weights_sha256" in printed_error(printed).got, "the recipe has to name it"
    assert train(*words, f"model.weights={moved}")[0] == 0


@pytest.mark.parametrize(
    "kind",
    ["arch", "damaged", *(pytest.param(kind, marks=FULL) for kind in ("stem", "norm", "channels", "digest", "text"))],
)
def test_weights_that_do_not_fit_are_refused_before_the_run_folder_exists(train, own_file, tmp_path, kind):
    path, values = tmp_path / "w.pth", NETWORK
    network = random_backbone(Arch(arch="resnet18", stem="imagenet" if kind == "stem" else "small"))
    state = network.state_dict()
    if kind == "norm":  # group normalization has no running statistics
        state = {key: value for key, value in state.items() if "running" not in key and "tracked" not in key}
    if kind == "channels":
        state["conv1.weight"] = state["conv1.weight"][:, :1]
    torch.save(state, path)
    if kind == "arch":
        values = []
    if kind == "damaged":
        path.write_bytes(path.read_bytes()[:5000])
    if kind == "text":
        path.write_text("no weights")
    if kind == "digest":
        values = [*NETWORK, f"model.weights_sha256={'0' * 64}"]
    code, printed = train("digits_msf", "--run", tmp_path / "run", *values, f"model.weights={path}")
    error = printed_error(printed)
    assert code == 2 and error.what.startswith("model.weights") and error.fix
    assert [entry.name for entry in tmp_path.iterdir()] == ["w.pth"]
    if kind in ("arch", "stem"):
        advice = [word for word in error.fix.split() if "=" in word]
        overrides = [*values, *advice, "views.size=32", "model.projector.hidden=[32]"]
        assert recipe.compose("digits_msf", overrides).model.arch == "resnet18"


def test_a_run_that_is_not_finished_has_no_last_weights(own_file, tmp_path, monkeypatch):
    """A single process takes its newest. Several could see different ones, and have to name a file."""
    source = RunDir(tmp_path / "source")
    source.weights.mkdir(parents=True)
    for step in (0, 3):
        shutil.copy(own_file, source.weights_at(step))
    composed = recipe.compose("digits_msf", [f"model.weights={source.root}"])
    run = RunDir(tmp_path / "run")
    assert initial_weights.resolve(composed, run).model.weights == str(source.weights_at(3))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError) as caught:
        initial_weights.resolve(composed, run)
    assert str(source.weights_at(3)) in caught.value.fix
    source.done.write_text(json.dumps({"step": 0, "weights": "weights/step-00000000.safetensors"}))
    assert initial_weights.resolve(composed, run).model.weights == str(source.weights_at(0))


# -- hpcssl train --from ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parent(shards, tmp_path_factory):
    """A finished run of six steps with checkpoints of the steps 2, 4 and 6."""
    run = tmp_path_factory.mktemp("parent") / "run"
    values = [f"data.train={shards.root}", *BASE, "machine.keep_checkpoints=9"]
    with pytest.raises(SystemExit) as caught:
        hpcssl.cli.main(["train", "digits_msf", "--run", str(run), *values])
    assert caught.value.code == 0
    return RunDir(run)


def test_without_changes_a_branch_is_its_parent(train, parent, tmp_path):
    run = RunDir(tmp_path / "run")
    code, printed = train("--from", f"{parent.root}@2", "--run", run.root)
    assert code == 0, printed
    for step in (4, 6):
        one, other = (SavedCheckpoint.open(folder.checkpoint(step)).digest() for folder in (parent, run))
        assert one == other
    journals = [{line["step"]: line["loss"] for line in read_lines(folder.journal)} for folder in (parent, run)]
    assert journals[1] == {step: loss for step, loss in journals[0].items() if step > 2}
    record = json.loads(run.parent.read_text())
    assert (record["path"], record["step"], record["changed"]) == (str(parent.root), 2, {})
    assert record["digest"] == SavedCheckpoint.open(parent.checkpoint(2)).digest()
    assert recipe.read(run.config).name == "digits_msf"
    (tmp_path / "link").symlink_to(parent.root)
    code, printed = train("--from", tmp_path / "link", "--run", run.root)
    assert code == 0, f"the same command on a finished run, by another path: {printed}"


def test_a_branch_that_is_interrupted_ends_with_the_same_bits(train, parent, tmp_path, monkeypatch):
    """Ended before its own first checkpoint, and after it; the parent is gone by then."""
    words = ["optim.lr=0.02", "views.query=weak", "schedule.steps=8", "machine.checkpoint_steps=3"]
    copy, undisturbed, interrupted = (tmp_path / name for name in ("parent", "undisturbed", "interrupted"))
    shutil.copytree(parent.root, copy)
    assert train("--from", f"{copy}@4", "--run", undisturbed, *words)[0] == 0
    for step in (5, 7):
        with monkeypatch.context() as patch:
            fail_at(patch, step)
            assert train("--from", f"{copy}@4", "--run", interrupted, *words)[0] == 1
        shutil.rmtree(copy, ignore_errors=True)
    code, printed = train("--from", f"{copy}@4", "--run", interrupted, *words)
    assert code == 0, printed
    assert checkpoint_digest(RunDir(interrupted)) == checkpoint_digest(RunDir(undisturbed))
    assert checkpoint_digest(RunDir(interrupted)) != checkpoint_digest(parent)
    changed = branch.read_parent(RunDir(interrupted))["changed"]
    assert changed.keys() == {"optim.lr", "views.query", "schedule.steps"}
    assert changed["optim.lr"] == [0.02, 0.1]
    assert [line["step"] for line in read_lines(RunDir(interrupted).journal)] == [5, 6, 7, 8]
    code, printed = train("--from", f"{copy}@2", "--run", interrupted, *words)
    assert code == 1 and printed_error(printed).what == f"run folder {interrupted}", "another checkpoint"


def test_a_branch_needs_no_weights_file_and_takes_no_other(parent, own_file, tmp_path):
    """The file that the parent started from may be gone."""
    source, run = RunDir(tmp_path / "parent"), RunDir(tmp_path / "run")
    shutil.copytree(parent.root, source.root)
    values = config.as_dict(recipe.read(source.config))
    values["model"] |= {"weights": "/gone/w.safetensors", "weights_sha256": "ab" * 32}
    source.config.write_text(config.to_yaml(recipe.from_values(values, "the test")))
    model = branches.compose_start("", [], run, parent=str(source.root))[0].model
    assert (model.weights, model.weights_sha256) == ("/gone/w.safetensors", "ab" * 32)
    with pytest.raises(ConfigError) as caught:
        branches.compose_start("", [f"model.weights={own_file}"], run, parent=str(source.root))
    assert "model.weights" in caught.value.what


def test_a_branch_lists_another_kind_of_norm(parent, tmp_path):
    before = recipe.read(parent.config).model.norm
    scope = "sync" if before != "sync" else "local"
    values = [f"model.norm={scope}", "schedule.steps=8"]
    _, start = branches.resolve("", values, RunDir(tmp_path / "run"), parent=str(parent.root))
    assert start.changed["model.norm"] == [scope, before]


def test_a_branch_replaces_nothing_of_another_run(parent, tmp_path):
    """It is written under the lock, when another command may have created the run, or a checkpoint may be there."""
    run = RunDir(tmp_path / "run")
    _, start = branches.resolve("", ["schedule.steps=8"], run, parent=f"{parent.root}@4")
    foreign = run.checkpoint(4)
    shutil.copytree(parent.checkpoint(4), foreign)
    change_manifest(foreign, lambda manifest: manifest.update(fingerprint="0" * 64))
    content = (foreign / "manifest.json").read_bytes()
    with pytest.raises(ResumeError):
        branches.write_branch(start, run)
    assert (foreign / "manifest.json").read_bytes() == content and not run.parent.exists()
    shutil.rmtree(foreign)
    branches.write_branch(start, run)
    assert foreign.is_dir()
    shutil.rmtree(foreign)
    shutil.copy(parent.config, run.config)
    branches.write_branch(start, run)
    assert not foreign.exists(), "the run exists by now"
    run.parent.unlink()
    with pytest.raises(ResumeError):  # it exists, and did not start from this parent
        branches.write_branch(start, run)


def test_a_start_that_was_interrupted_before_the_recipe_was_written_misleads_nobody(train, parent, tmp_path):
    run = RunDir(tmp_path / "run")
    _, start = branches.resolve("", ["schedule.steps=8"], run, parent=f"{parent.root}@4")
    branches.write_branch(start, run)  # and then the process ends
    code, printed = train("digits_msf", "--run", run.root)
    error = printed_error(printed)
    assert code == 1 and error.what == f"run folder {run.root}" and f"{parent.root}@4" in error.got
    assert not run.config.exists()
    code, printed = train("--from", f"{parent.root}@2", "--run", run.root)
    assert code == 0, printed
    assert branch.read_parent(run)["step"] == 2
    assert [line["step"] for line in read_lines(run.journal)] == [3, 4, 5, 6], "not from the other checkpoint"
    assert checkpoint_digest(run) == checkpoint_digest(parent)


@pytest.mark.parametrize("name", ["write_record", "atomic_dir"])
def test_a_start_that_is_killed_at_any_file_is_repeated(parent, tmp_path, monkeypatch, name):
    """No command without --from may continue from the checkpoint, not even one with the parent's own recipe."""
    run = RunDir(tmp_path / "run")
    _, start = branches.resolve("", [], run, parent=f"{parent.root}@4")

    def kill(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(branch.files, name, kill)
        start.write(run)
    if run.checkpoint(4).exists():
        with pytest.raises(ResumeError):
            branch.check_no_interrupted_start(run)
    branches.write_branch(start, run)
    assert branch.read_parent(run)["step"] == 4 and run.checkpoint(4).is_dir()


def test_a_run_that_another_command_creates_meanwhile_keeps_its_recipe(parent, tmp_path):
    """Both commands have looked at an empty folder; this one gets the lock after the other one has ended."""
    run, own = RunDir(tmp_path / "run"), recipe.read(parent.config)
    changed = replace(own, optim=replace(own.optim, lr=0.02))
    for is_finished in (False, True):
        shutil.rmtree(run.root, ignore_errors=True)
        run.root.mkdir()
        for path in (parent.config, parent.data, *([parent.done] if is_finished else [])):
            shutil.copy(path, run.root)
        before = run.config.read_bytes()
        with pytest.raises(ResumeError) as caught:
            runs.train(run, changed, stop=StopFlag())
        assert "optim.lr" in caught.value.got and run.config.read_bytes() == before


REFUSED = {
    "another method": (["method.name=byol"], 2),
    "another network": (["model.arch=resnet18"], 1),
    "another width": (["model.projector.out=32", "model.predictor.out=32"], 1),
    "another bank": (["bank.size=32"], 1),
    "no momentum": (["optim.momentum=0", "schedule.steps=9"], 1),
    "another optimizer": (["optim.name=lars", "schedule.steps=9"], 1),
    "loss scaling": (["optim.precision=fp16", "schedule.steps=9"], 1),
    "no further step": (["optim.lr=0.02"], 1),
    "more neighbors than the bank": (["method.k=99", "schedule.steps=9"], 2),
}


QUICK = ("another method", "another bank", "no further step")


@pytest.mark.parametrize("case", [pytest.param(case, marks=() if case in QUICK else FULL) for case in REFUSED])
def test_changes_that_the_state_does_not_allow(train, parent, tmp_path, case):
    values, exit_code = REFUSED[case]
    code, printed = train("--from", parent.root, "--run", tmp_path / "run", *values)
    assert code == exit_code and printed_error(printed).expected, printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["nowhere", "PARENT@3", "EMPTY", "RECIPE"])
def test_a_parent_that_does_not_exist(train, parent, tmp_path, text):
    (tmp_path / "empty").mkdir()
    named = text.replace("PARENT", str(parent.root)).replace("EMPTY", str(tmp_path / "empty"))
    words = ["--from", parent.root, "digits_msf"] if text == "RECIPE" else ["--from", named]
    code, printed = train(*words, "--run", tmp_path / "run")
    assert code in (1, 2) and printed_error(printed).fix
    assert not (tmp_path / "run").exists()


@pytest.mark.full
def test_a_damaged_checkpoint_of_the_parent_is_refused(train, parent, tmp_path):
    copy = tmp_path / "parent"
    shutil.copytree(parent.root, copy)
    part = copy / "checkpoints" / "step-00000004" / "part-0.safetensors"
    body = bytearray(part.read_bytes())
    body[-1] ^= 1
    part.write_bytes(body)
    code, printed = train("--from", f"{copy}@4", "--run", tmp_path / "run")
    assert code == 1 and "step-00000004" in printed_error(printed).what
    assert not RunDir(tmp_path / "run").config.exists()
    assert train("--from", f"{copy}@2", "--run", tmp_path / "run")[0] == 0, "following the advice"


@pytest.mark.full
def test_other_data_is_stated(train, parent, tmp_path, make_shards, encode, picture):
    other = make_shards(tmp_path / "data", [(f"{i}", encode(picture(i + 70)), 0) for i in range(48)])
    code, printed = train(
        "--from", parent.root, "--run", tmp_path / "run", f"data.train={other.root}", "schedule.steps=7"
    )
    assert code == 0, printed
    assert branch.read_parent(RunDir(tmp_path / "run"))["changed"].keys() == {"data.train", "schedule.steps"}
    assert "data.train" in printed


def test_a_submitted_branch(train, parent, tmp_path, monkeypatch):
    """The checkpoint is copied by the submission. The job, which knows the run folder alone, goes on from there.

    Rollbacks of the parent do not count towards the limit of the branch.
    """
    run, source = RunDir(tmp_path / "run"), RunDir(tmp_path / "parent")
    shutil.copytree(parent.root, source.root)
    change_manifest(source.checkpoint(4), lambda manifest: manifest["numbers"].update(rolled_back=[[2, 3]]))
    monkeypatch.setattr(local, "launch", lambda run, options, *gpus: [])
    monkeypatch.setattr(code_snapshot, "create_snapshot", lambda run: None)
    words = ["--from", f"{source.root}@4", "--run", run.root, "schedule.steps=7"]
    code, printed = train(*words, "--local", main=slurm.cli.main, verb=())
    assert code == 0, printed
    assert run.checkpoint(4).is_dir() and branch.read_parent(run)["step"] == 4
    assert runs.train(run, stop=StopFlag()) == 0
    saved = SavedCheckpoint.open(run.checkpoint(7))
    assert saved.step == 7 and saved.manifest["numbers"]["rolled_back"] == []
    assert [line["step"] for line in read_lines(run.journal)] == [5, 6, 7]
