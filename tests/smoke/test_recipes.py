"""Every packaged recipe resolves, and trains two steps at small sizes. The recipes are those of `hpcssl recipes`."""

import json

import pytest
import torch

from hpcssl import config
from hpcssl.distributed.world import World
from hpcssl.methods.diagnostics import spread
from hpcssl.nets import resnet
from hpcssl.nets.resnet import Arch
from hpcssl.run import compose
from hpcssl.run_dir import RunDir
from hpcssl.signals import StopFlag
from hpcssl.train import gpu_memory, main, recipe

SMALL = [
    "machine.devices=cpu",
    "machine.threads=1",
    "machine.checkpoint_minutes=0",
    "evals.knn_every_epochs=0",
    "model.arch=resnet_tiny",
    "model.stem=small",
    "views.size=16",
    "optim.batch=16",
    "schedule.steps=2",
    "schedule.warmup_epochs=0",
    "bank.size=32",
    "views.crops.size=8",
]


@pytest.mark.parametrize("name", recipe.names())
def test_two_steps(name, shards, tmp_path):
    ghost = ["model.norm_group_size=8"] if recipe.compose(name).model.norm == "ghost" else []
    run = RunDir(tmp_path / "run")
    composed = compose(name, [*SMALL, *ghost, f"data.train={shards.root}"])
    run.root.mkdir()
    run.config.write_text(config.to_yaml(composed))
    assert main.train(run, stop=StopFlag()) == 0
    done = json.loads(run.done.read_text())
    assert done["step"] == 2 and (run.root / done["weights"]).exists()
    second_encoder = run.weights / "second" / (run.root / done["weights"]).name
    assert second_encoder.exists() == name.endswith("_cross"), "only cross-modal recipes have a second encoder"
    lines = [json.loads(line) for line in run.journal.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(isinstance(line["loss"], float) for line in lines), "a loss was not finite"


@pytest.mark.parametrize("name", recipe.names())
def test_a_resolved_recipe_is_unchanged_when_read_again(name, tmp_path):
    composed = recipe.compose(name)
    (tmp_path / "config.yaml").write_text(config.to_yaml(composed))
    assert config.as_dict(recipe.read(tmp_path / "config.yaml")) == config.as_dict(composed)


@pytest.mark.parametrize("name", recipe.names())
def test_every_recipe_has_a_title_and_a_source(name):
    about = recipe.compose(name).about
    assert about.title and about.source


@pytest.mark.parametrize("name", recipe.names())
def test_only_moco_and_simclr_have_heads_without_norms(name):
    """A recipe inherits the head of its base, which must still fit the recipe's own method."""
    composed = recipe.compose(name)
    assert composed.model.projector.norm or composed.method.name in ("moco", "simclr")


def test_the_fingerprint_changes_only_with_values_that_change_results():
    base = recipe.compose("digits_msf")
    fingerprint = config.fingerprint(base.science("d", 2))
    for same in (
        ["machine.loader_threads=4"],
        ["machine.checkpoint_steps=3"],
        ["evals.knn_every_epochs=5"],
        ["data.val=/x"],
        ["bank.placement=sharded"],
        ["about.title=other"],
    ):
        assert config.fingerprint(recipe.compose("digits_msf", same).science("d", 2)) == fingerprint, same
    for other in (
        ["seed=1"],
        ["optim.lr=0.2"],
        ["method.k=3"],
        ["bank.size=64"],
        ["views.query=weak"],
        ["schedule.epochs=3"],
        ["optim.precision=bf16"],
        ["model.norm=sync"],
        ["data.shuffle_window=2"],
    ):
        assert config.fingerprint(recipe.compose("digits_msf", other).science("d", 2)) != fingerprint, other
    assert config.fingerprint(base.science("e", 2)) != fingerprint, "the digest of the data"
    assert config.fingerprint(base.science("d", 4)) != fingerprint, "local norm has other groups in another world"


def test_the_spread_diagnostic_detects_collapsed_embeddings():
    torch.manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(512, 64), dim=1)
    assert spread(rows) == pytest.approx(1.0, abs=0.05)
    assert spread(rows[:1].expand(512, 64)) < 1e-6


def test_collectives_of_a_single_process_are_the_identity():
    world, x = World.single_process(), torch.arange(4.0)
    assert world.all_gather(x) is not None and torch.equal(world.all_gather(x), x)
    assert torch.equal(world.all_reduce_mean(x), x)
    assert world.broadcast_text("a") == "a" and world.all_gather_text("b") == ["b"] and world.is_main


def test_the_memory_estimate_counts_saved_activations_and_the_bank():
    """Activations on the meta device are those of a real pass; a sharded bank costs each rank its part of the rows."""
    arch = Arch(arch="resnet_tiny", stem="small", zero_init_residual=False)
    real = [resnet.build(arch)]
    with torch.device("meta"):
        meta = [resnet.build(arch)]
    x = torch.randn(2, 3, 32, 32)
    saved_bytes = gpu_memory.saved_for_backward(real, x)
    assert saved_bytes == gpu_memory.saved_for_backward(meta, x.to("meta"))
    assert saved_bytes > 2 * 16 * 32 * 32 * 4

    def estimate(*overrides, ranks=4):
        return gpu_memory.estimate(recipe.compose("msf_r50_ep200_128k", list(overrides)), ranks)

    assert estimate("bank.size=128000").bank == 128000 * (512 * 4 + 16)
    assert estimate("bank.size=128000", "bank.placement=sharded").bank == 32000 * (512 * 4 + 16)
    half_batch = estimate("machine.accumulation_steps=2")
    assert estimate().activations == 2 * estimate(ranks=8).activations == 2 * half_batch.activations
    assert estimate("optim.precision=fp32").activations == 2 * estimate("optim.precision=bf16").activations
    assert estimate("views.crops.count=2").activations > estimate().activations
    two_queues = gpu_memory.estimate(recipe.compose("cmsf_2q_r50_ep200_128k"), 4)
    assert estimate().embedding_table == 0 < two_queues.embedding_table


@pytest.mark.parametrize(("name", "share"), [("digits_msf", 0), ("digits_cmsf_2q", 1), ("digits_cmsf_semi", 1 / 10)])
def test_a_checkpoint_has_embeddings_of_the_images_that_a_method_keeps(name, share):
    composed, images = recipe.compose(name), 10_000
    none, all_images = (gpu_memory.estimate_saved_bytes(composed, number) for number in (0, images))
    row = composed.model.projector.out * 4 + 8
    assert all_images[0] - none[0] == share * images * row and all_images[1] == none[1]
