"""One rank of a test of collectives and norms: ``python ranks.py FOLDER [DEVICE]`` with the variables of torchrun.

DEVICE is ``cpu`` or a GPU that all ranks share: gloo takes the tensors of both.

The results of this rank go to FOLDER/RANK.pt. test_world.py compares them with ``compute(World.single_process())``.
"""

import sys

import torch

from hpcssl import errors, rng
from hpcssl.distributed.world import World
from hpcssl.nets import norm

BATCH, C = 16, 3
GROUPS = (2, 4, 8, 16)
SHAPES = ((BATCH, C, 5, 4), (BATCH, C))


def draw(*name, shape):
    """Random numbers, float64 [*shape]: the same ones on gathered rank for the same name."""
    return torch.randn(shape, generator=rng.generator(rng.key(0, *name)), dtype=torch.float64)


def draw_images(shape):
    """The global batch of ``run_norm``, float64 [*shape], with a mean of 1 and a standard deviation of 3."""
    return draw("x", len(shape), shape=shape) * 3 + 1


def run_norm(world, group, shape, running="all_groups"):
    """Two passes through one norm: this rank's rows of the output and of the gradients, and the running statistics."""
    layer = norm.BatchNorm(C, group=group, world=world, running=running).to(world.device, torch.float64)
    with torch.no_grad():
        layer.weight.copy_(draw("weight", shape=(C,)))
        layer.bias.copy_(draw("bias", shape=(C,)))
    network = world.wrap_in_ddp(layer)
    x = world.local_rows(draw_images(shape)).to(world.device).requires_grad_()
    for step in range(2):
        y = network(x * (step + 1))
        wanted = world.local_rows(draw("wanted", step, shape=shape)).to(world.device)
        (y * wanted).flatten(1).sum(1).mean().backward()
    norm.commit_pending([layer], world)
    return {
        "y": y.detach(),
        "dx": x.grad / world.size,
        "dw": layer.weight.grad,
        "db": layer.bias.grad,
        "mean": layer.running_mean,
        "var": layer.running_var,
    }


def compute(world):
    """This rank's results of the norms, of a gradient through all_gather, and of shuffled rows."""
    results = {("norm", g, len(s)): run_norm(world, g, s) for g in GROUPS for s in SHAPES}
    results |= {("first group", g): run_norm(world, g, SHAPES[1], "first_group") for g in GROUPS}
    x = world.local_rows(draw("rows", shape=(BATCH, C))).to(world.device).requires_grad_()
    gathered = world.all_gather_with_grad(x)
    loss = torch.logsumexp(x @ gathered.T, 1).mean()  # each row against all rows of the world, as in SimCLR
    loss.backward()
    order = torch.as_tensor(rng.permutation(rng.key(0, "order"), BATCH)).to(world.device)
    shuffled = world.shuffle(x.detach(), order)
    results["grad"] = {"dx": x.grad / world.size}
    results["rows"] = {
        "gathered": gathered.detach(),
        "unshuffled": world.unshuffle(shuffled, order),
        "shuffled": shuffled,
        "flags": world.all_gather(x.detach() > 0),
    }
    return results


def main(folder, device="cpu"):
    torch.set_num_threads(1)
    world = World.start("cpu", timeout_s=60)
    world.device = torch.device(device)
    results = compute(world)
    results["sum"] = world.all_reduce_sum(torch.tensor([float(world.rank), 1.0], device=device))
    maximum = world.all_reduce_max(torch.tensor([float(world.rank), 0.0], device=device))
    results["max on device"] = maximum.on_device().clone()
    results["max"] = maximum.result()
    results["any"] = (world.any(world.rank == world.size - 1), world.any(False))
    results["text"] = (world.broadcast_text(f"rank {world.rank}, λ", 1), world.all_gather_text("x" * world.rank))
    gather, gathered = world.all_gather, []
    world.all_gather = lambda x: gathered.append(len(x)) or gather(x)
    long = "a long text " * (1000 if world.rank == 0 else 9999)
    results["long text"] = (
        len(world.broadcast_text(long)),
        world.broadcast_text("only of rank 1"[: 99 * world.rank], 0),
    )
    del world.all_gather
    results["gathered for a text"] = max(gathered)

    def fail():
        raise errors.DataError("a shard", got="nothing", expected="a shard", fix="write it")

    try:
        world.run_on_main(fail)
    except errors.DataError as error:
        results["error"] = error.to_json()
    torch.save(results, f"{folder}/{world.rank}.pt")
    world.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
