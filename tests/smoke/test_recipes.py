"""Every packaged recipe composes, and takes two steps on small sizes: one test over what `hpcssl recipes` lists."""

import json

import pytest

from hpcssl import config
from hpcssl.files import RunDir
from hpcssl.run import compose
from hpcssl.signals import StopFlag
from hpcssl.train import main, recipe
from hpcssl.world import World

SMALL = ["machine.devices=cpu", "machine.threads=1", "machine.checkpoint_minutes=0", "evals.every_epochs=0",
         "model.arch=resnet_tiny", "model.stem=small", "views.size=16", "optim.batch=16", "schedule.steps=2",
         "schedule.warmup_epochs=0", "bank.size=32", "views.crops.size=8"]


@pytest.mark.parametrize("name", recipe.names())
def test_two_steps(name, shards, tmp_path):
    ghost = ["model.norm_group=8"] if recipe.compose(name).model.norm == "ghost" else []
    run = RunDir(tmp_path / "run")
    made = compose(name, [*SMALL, *ghost, f"data.train={shards.root}"])
    run.root.mkdir()
    run.config.write_text(config.to_yaml(made))
    assert main.train(run, stop=StopFlag()) == 0
    done = json.loads(run.done.read_text())
    assert done["step"] == 2 and (run.root / done["weights"]).exists()
    beside = run.weights / "second" / (run.root / done["weights"]).name
    assert beside.exists() == name.endswith("_cross"), "the second modality's encoder, where there is one"
    lines = [json.loads(line) for line in run.journal.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(isinstance(line["loss"], float) for line in lines), "a loss was not finite"


@pytest.mark.parametrize("name", recipe.names())
def test_resolved_recipe_reads_back_as_itself(name, tmp_path):
    made = recipe.compose(name)
    (tmp_path / "config.yaml").write_text(config.to_yaml(made))
    assert config.as_dict(recipe.read(tmp_path / "config.yaml")) == config.as_dict(made)


@pytest.mark.parametrize("name", recipe.names())
def test_recipe_says_what_it_reproduces(name):
    about = recipe.compose(name).about
    assert about.title and about.source


@pytest.mark.parametrize("name", recipe.names())
def test_only_moco_and_simclr_have_heads_without_norms(name):
    """A recipe takes over the head of the one that it is like: what it leaves unsaid must still be its method's."""
    made = recipe.compose(name)
    assert made.model.projector.norm or made.method.name in ("moco", "simclr")


def test_science_and_machinery():
    """The fingerprint moves with what changes results, and with nothing else."""
    base = recipe.compose("digits_msf")
    print_ = config.fingerprint(base.science("d", 2))
    for same in (["machine.loader_threads=4"], ["machine.checkpoint_steps=3"], ["evals.every_epochs=5"],
                 ["data.val=/x"], ["bank.placement=sharded"], ["about.title=other"]):
        assert config.fingerprint(recipe.compose("digits_msf", same).science("d", 2)) == print_, same
    for other in (["seed=1"], ["optim.lr=0.2"], ["method.k=3"], ["bank.size=64"], ["views.query=weak"],
                  ["schedule.epochs=3"], ["optim.precision=bf16"], ["model.norm=whole"], ["data.window=2"]):
        assert config.fingerprint(recipe.compose("digits_msf", other).science("d", 2)) != print_, other
    assert config.fingerprint(base.science("e", 2)) != print_, "the data's digest"
    assert config.fingerprint(base.science("d", 4)) != print_, "local norm means other groups on another world"


def test_collapsed_embeddings_show_in_the_diagnostic():
    import torch

    from hpcssl.methods.diagnostics import spread

    torch.manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(512, 64), dim=1)
    assert spread(rows) == pytest.approx(1.0, abs=0.05)
    assert spread(rows[:1].expand(512, 64)) < 1e-6


def test_world_alone_is_the_identity():
    import torch

    world, x = World.alone(), torch.arange(4.0)
    assert world.gather(x) is not None and torch.equal(world.gather(x), x) and torch.equal(world.mean(x), x)
    assert world.tell("a") == "a" and world.gather_text("b") == ["b"] and world.main


def test_the_estimate_of_memory_counts_what_autograd_keeps():
    """Activations without storage are those of a real pass; a bank costs its rows, a sharded one its part of them."""
    import torch

    from hpcssl.nets import resnet
    from hpcssl.nets.resnet import Arch
    from hpcssl.train import memory

    arch = Arch(arch="resnet_tiny", stem="small", zero_init_residual=False)
    real = [resnet.build(arch)]
    with torch.device("meta"):
        blank = [resnet.build(arch)]
    x = torch.randn(2, 3, 32, 32)
    assert memory.saved_for_backward(real, x) == memory.saved_for_backward(blank, x.to("meta")) > 2 * 16 * 32 * 32 * 4

    def of(*overrides, ranks=4):
        return memory.estimate(recipe.compose("msf_r50_ep200_128k", list(overrides)), ranks)

    assert of("bank.size=128000").bank == 128000 * (512 * 4 + 16)
    assert of("bank.size=128000", "bank.placement=sharded").bank == 32000 * (512 * 4 + 16)
    assert of().activations == 2 * of(ranks=8).activations == 2 * of("machine.accumulate=2").activations
    assert of("optim.precision=fp32").activations == 2 * of("optim.precision=bf16").activations
    assert of("views.crops.number=2").activations > of().activations
    assert of().ledger == 0 < memory.estimate(recipe.compose("cmsf_2q_r50_ep200_128k"), 4).ledger
