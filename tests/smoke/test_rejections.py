"""Recipes that cannot work are refused before anything exists, and following the advice of the message works.

docs/reference/checks.md lists the dependencies. Each case here is one of them: the command ends with exit code 1 or 2,
names the key, leaves no run folder, and takes little time. Where the fix is ``key=value``, it is applied. By default a
few cases are run, some of each kind of check.
"""

import re
import time

import pytest

import hpcssl.cli
import slurm.cli
from hpcssl.distributed.launch import count_processes
from hpcssl.preparation import branches
from hpcssl.run_dir import RunDir
from tests.printed import printed_error

SMALL = ["machine.devices=cpu", "views.size=16", "optim.batch=16", "schedule.epochs=4", "bank.size=32"]
STEPS = "schedule.shape=steps"
REFILL = "method.neighbors.support=encoder"
CASES = {  # recipe, overrides, what the message names
    "more neighbors than the bank": ("digits_msf", ["method.k=1000"], "method.k"),
    "more neighbors than the bank, nnclr": ("digits_nnclr", ["method.neighbors.k=33"], "method.neighbors.k"),
    "more allowed rows than the bank": ("digits_cmsf_2q", ["method.k_constraint=33"], "method.k_constraint"),
    "bank smaller than the batch": ("digits_msf", ["bank.size=8"], "bank.size"),
    "bank that is not refilled in batches": ("digits_nnclr", [REFILL, "bank.size=20"], "bank.size"),
    "support set larger than the data": (
        "digits_nnclr",
        [REFILL, "bank.size=48"],
        "bank.size",
    ),
    "bank of an unknown kind": ("digits_msf", ["bank.init=zeros"], "bank.init"),
    "bank in an unknown place": ("digits_msf", ["bank.placement=split"], "bank.placement"),
    "batch larger than the data": ("digits_msf", ["optim.batch=64"], "the global batch"),
    "batch that is not divided evenly": ("digits_msf", ["machine.accumulation_steps=3"], "machine.accumulation_steps"),
    "micro-batches of a contrastive loss": (
        "digits_simclr",
        ["machine.accumulation_steps=2"],
        "machine.accumulation_steps",
    ),
    "norm groups that do not tile": ("digits_msf", ["model.norm=ghost", "model.norm_group_size=5"], "1 processes"),
    "momentum of the norms": ("digits_msf", ["model.norm_momentum=1.5"], "model.norm_momentum"),
    "shuffled norms without a target encoder": ("digits_simsiam", ["model.shuffle_bn=true"], "model.shuffle_bn"),
    "joint norms of two modalities": ("digits_cmsf_cross", ["model.joint_forward=true"], "model.joint_forward"),
    "second modality that is not used": (
        "digits_msf",
        ["views.second_query=weak"],
        "views.second_query, views.second_target",
    ),
    "predictor of another width": ("digits_msf", ["model.predictor.out=32"], "model.predictor.out"),
    "layer without outputs": ("digits_msf", ["model.projector.hidden=[0]"], "model.projector.hidden"),
    "images smaller than the stride": ("digits_msf", ["model.arch=resnet18", "model.stem=imagenet"], "views.size"),
    "crops smaller than the stride": (
        "digits_nnclr_mc",
        ["model.arch=resnet18", "model.stem=imagenet", "views.size=64"],
        "views.crops.size",
    ),
    "crops larger than the views": ("digits_nnclr_mc", ["views.crops.size=24"], "views.crops.size"),
    "crop scales in falling order": ("digits_nnclr_mc", ["views.crops.scale=[0.5,0.1]"], "views.crops.scale"),
    "crops of an unknown augmentation": ("digits_msf", ["views.crops.augment=strang"], "views.crops.augment"),
    "deviation of 0": ("digits_msf", ["views.std=[0,0.5,0.5]"], "views.std"),
    "mean on another scale": ("digits_msf", ["views.mean=[127,127,127]"], "views.mean"),
    "temperature of 0": ("digits_moco_v2", ["method.temperature=0"], "method.temperature"),
    "momentum above 1": ("digits_msf", ["method.ema.momentum=1.1"], "method.ema.momentum"),
    "warm-up as long as the run": ("digits_msf", ["schedule.warmup_epochs=4"], "schedule"),
    "warm-up from above": ("digits_msf", ["schedule.warmup_lr=0.2"], "schedule.warmup_lr"),
    "cosine that rises": ("digits_msf", ["schedule.final_lr=0.2"], "schedule.final_lr"),
    "milestone after the end": ("digits_msf", [STEPS, "schedule.milestones=[2,9]"], "schedule.milestones"),
    "milestone after the last step": (
        "digits_msf",
        [STEPS, "schedule.epochs=null", "schedule.steps=3", "schedule.milestones=[2]"],
        "schedule.milestones",
    ),
    "optimizer without such a parameter": (
        "digits_msf",
        ["optim.exclude_norm_and_bias=true", "optim.not_excluded=[nothing.weight]"],
        "optim.not_excluded",
    ),
    "k-NN after the end": ("digits_msf", ["evals.knn_every_epochs=5", "evals.knn.k=[1]"], "evals.knn_every_epochs"),
    "k-NN at negative times": ("digits_msf", ["evals.knn_every_epochs=-1"], "evals.knn_every_epochs"),
    "k-NN with more neighbors than images": ("digits_msf", ["evals.knn_every_epochs=1", "evals.knn.k=[41]"], "k-NN"),
    "k-NN without validation shards": (
        "digits_msf",
        ["evals.knn_every_epochs=1", "data.val=''"],
        "evals.knn_every_epochs",
    ),
    "validation shards that do not exist": ("digits_msf", ["data.val=nowhere"], "shard folder HERE/nowhere"),
    "as many clusters as images": ("digits_cmsf_km", ["method.num_clusters=40"], "method.num_clusters"),
    "more fits than steps": (
        "digits_cmsf_semi",
        ["method.pseudo_labels.fits_per_epoch=3"],
        "method.pseudo_labels.fits_per_epoch",
    ),
    "prototypes that are never trained": (
        "digits_swav",
        ["method.freeze_steps=8", "method.queue=false", "method.queue_start_epoch=15"],
        "method.freeze_steps",
    ),
    "queue that is never used": (
        "digits_swav",
        ["method.freeze_steps=0", "method.queue_start_epoch=3"],
        "method.queue_start_epoch",
    ),
    "kept checkpoints that are not saved": ("digits_msf", ["machine.keep_every_steps=5"], "machine.keep_every_steps"),
    "kept checkpoints between the saved ones": (
        "digits_msf",
        ["machine.checkpoint_steps=2", "machine.keep_every_steps=5"],
        "machine.keep_every_steps",
    ),
    "checkpoints at negative times": ("digits_msf", ["machine.checkpoint_steps=-1"], "machine.checkpoint_steps"),
    "apex on a CPU": ("digits_msf", ["machine.fused=apex", "machine.devices=cpu"], "machine.fused"),
    "LARS of apex": ("digits_msf", ["machine.fused=apex", "optim.name=lars"], "machine.fused"),
    "unknown fused optimizer": ("digits_msf", ["machine.fused=apexx"], "machine.fused"),
    "kernels of a GPU on a CPU": ("digits_msf", ["machine.kernels=fast", "machine.devices=cpu"], "machine.kernels"),
    "no time to wait for each other": ("digits_msf", ["machine.timeout_minutes=0"], "machine.timeout_minutes"),
    "digest without a file": ("digits_msf", ["model.weights_sha256=ab"], "model.weights_sha256"),
    "weights that do not exist": ("digits_msf", ["model.weights=nowhere.pth"], "model.weights"),
    "weights of an empty folder": ("digits_msf", ["model.weights=."], "model.weights"),
}
QUICK = (  # of each place that checks, a case or two; the others are rarer
    "more neighbors than the bank",
    "bank smaller than the batch",
    "support set larger than the data",
    "batch larger than the data",
    "micro-batches of a contrastive loss",
    "norm groups that do not tile",
    "predictor of another width",
    "crops larger than the views",
    "warm-up as long as the run",
    "milestone after the last step",
    "k-NN with more neighbors than images",
    "validation shards that do not exist",
    "queue that is never used",
    "kept checkpoints between the saved ones",
    "weights that do not exist",
)
SUBMITTED = tuple(CASES)[::7]  # the checks are the same: some are enough


def is_quick(command, case):
    return case in (QUICK if command == "hpcssl" else SUBMITTED[:2])


COMMANDS = [
    pytest.param(command, case, marks=() if is_quick(command, case) else pytest.mark.full)
    for command, cases in (("hpcssl", CASES), ("hpcssl-submit", SUBMITTED))
    for case in cases
]


@pytest.fixture(scope="module")
def warm(shards, tmp_path_factory):
    """What the commands import at their first call is imported."""
    run = tmp_path_factory.mktemp("warm") / "run"
    words = ["digits_msf", "--run", str(run), f"data.train={shards.root}", f"data.val={shards.root}", *SMALL]
    words += ["evals.knn_every_epochs=1", "evals.knn.k=[41]"]  # refused by the last check
    for main, verb in ((hpcssl.cli.main, ["train"]), (slurm.cli.main, ["submit", "--local"])):
        with pytest.raises(SystemExit):
            main([*verb, *words])


def call(main, words, capsys):
    """Run a command in this process and return its exit code, and what it printed on stderr."""
    with pytest.raises(SystemExit) as caught:
        main(list(map(str, words)))
    return caught.value.code, capsys.readouterr().err


def settings_in(text):
    """The ``key=value`` items of a fix, except for placeholders in capitals."""
    items = re.findall(r"(?<![\w.])[a-z]\w*(?:\.\w+)+=(?:\[[^\]]*\]|[\w./-]+)", text)
    return [item for item in items if not item.partition("=")[2].isupper()]


@pytest.mark.parametrize(("command", "case"), COMMANDS)
@pytest.mark.usefixtures("warm")
def test_nothing_is_left_behind_and_the_advice_works(command, case, shards, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name, overrides, key = CASES[case]
    words = [f"data.train={shards.root}", f"data.val={shards.root}", *SMALL, *overrides]
    start = time.thread_time()  # not that of the threads of other tests in this process
    if command == "hpcssl":
        code, printed = call(hpcssl.cli.main, ["train", name, "--run", "run", *words], capsys)
    else:
        code, printed = call(slurm.cli.main, [name, "--run", "run", "--local", *words], capsys)
    assert time.thread_time() - start < 2
    error = printed_error(printed)
    assert code in (1, 2) and error.what == key.replace("HERE", str(tmp_path)), error
    assert list(tmp_path.iterdir()) == []
    if advice := settings_in(error.fix):
        given = [word for word in words if word.partition("=")[0] not in {a.partition("=")[0] for a in advice}]
        recipe, _ = branches.resolve(name, [*given, *advice], RunDir(tmp_path / "run"), parent=None)
        assert recipe.method.name


def test_the_corrected_command_trains_in_the_same_folder(shards, tmp_path, capsys):
    words = ["train", "digits_msf", "--run", tmp_path / "run", f"data.train={shards.root}", *SMALL, "schedule.epochs=1"]
    assert call(hpcssl.cli.main, [*words, "method.k=1000"], capsys)[0] == 2
    assert not (tmp_path / "run").exists()
    assert call(hpcssl.cli.main, [*words, "method.k=5"], capsys)[0] == 0
    assert (tmp_path / "run" / "done.json").exists()


NO_RECIPES = {
    "empty": b"",
    "comment": b"# nothing\n",
    "list": b"- a\n- b\n",
    "word": b"msf\n",
    "binary": b"\x89PNG\r\n\x1a\n\x00\x00",
    "cut short": b"a: [1",
    "null section": b"base: digits_msf\nmethod:\nabout:\n",
    "list of bases": b"base: [1]\n",
}


@pytest.mark.parametrize("content", NO_RECIPES.values(), ids=NO_RECIPES)
def test_a_file_that_is_no_recipe(content, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_bytes(content)
    for main, words in ((hpcssl.cli.main, ["train"]), (slurm.cli.main, ["submit", "--local"])):
        code, printed = call(main, [*words, "mine.yaml", "--run", "run"], capsys)
        error = printed_error(printed)
        assert code == 2 and error.what and "Traceback" not in printed
        assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("digits_cmsf_sup", []),
        ("digits_cmsf_semi", ["method.pseudo_labels.fits_per_epoch=2"]),
        ("digits_nnclr", ["method.neighbors.rule=oracle"]),
        ("digits_msf", ["evals.knn_every_epochs=1"]),
    ],
)
def test_labels_that_are_needed_and_missing(name, overrides, make_shards, encode, picture, tmp_path, capsys):
    unlabeled = make_shards(tmp_path / "data", [(f"{i}", encode(picture(i)), -1) for i in range(40)])
    data = [f"data.train={unlabeled.root}", f"data.val={unlabeled.root}"]
    words = ["train", name, "--run", tmp_path / "run", *data, *SMALL, *overrides]
    code, printed = call(hpcssl.cli.main, words, capsys)
    assert code == 1 and "label" in printed_error(printed).got
    assert not (tmp_path / "run").exists()


def test_more_epochs_between_evaluations_than_the_run_has(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["digits_msf", "--run", "run", "--local", "--eval-every", "5", *SMALL]
    code, printed = call(slurm.cli.main, [*words, f"data.train={shards.root}", f"data.val={shards.root}"], capsys)
    assert code == 2 and printed_error(printed).fix == "--eval-every 4"
    assert list(tmp_path.iterdir()) == []


def test_a_bank_larger_than_the_data_is_used_with_one_warning(shards, tmp_path, monkeypatch, caplog):
    """Published results use such banks. Of several processes one warns; the queue of SwAV takes no harm."""
    data = [f"data.train={shards.root}", *SMALL, "bank.size=64", "machine.devices=cpu"]
    swav = ["schedule.epochs=9", "method.freeze_steps=0", "method.queue_start_epoch=5"]
    for name, values, rank, warnings in (
        ("digits_msf", [], 0, 1),
        ("digits_moco_v2", [], 0, 1),
        ("digits_msf", [], 1, 0),
        ("digits_swav", swav, 0, 0),
    ):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        caplog.clear()
        recipe, _ = branches.resolve(name, [*data, *values], RunDir(tmp_path / "run"), parent=None)
        assert recipe.bank.size == 64
        assert len([r for r in caplog.records if "bank.size=64" in r.getMessage()]) == warnings, (name, rank)


@pytest.mark.parametrize(
    ("variables", "size"),
    [
        ({}, 1),
        ({"RANK": "3", "WORLD_SIZE": "4"}, 4),  # without an address, which is not looked up
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NODELIST": "n[1-2]"}, 8),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, 1),  # a shell in an allocation
        ({"RANK": "0"}, None),
        ({"WORLD_SIZE": "many"}, None),
    ],
)
def test_the_number_of_processes(variables, size):
    assert count_processes(variables) == size
