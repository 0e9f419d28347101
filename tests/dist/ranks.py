"""One rank of a world of collectives and norms: ``python ranks.py FOLDER`` with torchrun's variables.

What this rank computed goes to FOLDER/RANK.pt; test_world.py compares it with ``play(World.alone())``.
"""

import sys

import torch

from hpcssl import errors, rng
from hpcssl.nets import norm
from hpcssl.world import World

BATCH, C = 16, 3
GROUPS = (2, 4, 8, 16)
SHAPES = ((BATCH, C, 5, 4), (BATCH, C))


def drawn(*address, shape):
    return torch.randn(shape, generator=rng.generator(rng.key(0, *address)), dtype=torch.float64)


def norm_once(world, group, shape):
    """Output, gradients and running statistics of two passes through one norm: this rank's part of each."""
    layer = norm.BatchNorm(C, group=group, world=world).double()
    with torch.no_grad():
        layer.weight.copy_(drawn("weight", shape=(C,)))
        layer.bias.copy_(drawn("bias", shape=(C,)))
    network = world.parallel(layer)
    x = world.part(drawn("x", len(shape), shape=shape) * 3 + 1).requires_grad_()
    for turn in range(2):
        y = network(x * (turn + 1))
        wanted = world.part(drawn("wanted", turn, shape=shape))
        (y * wanted).flatten(1).sum(1).mean().backward()
    norm.commit([layer], world)
    return {"y": y.detach(), "dx": x.grad / world.size, "dw": layer.weight.grad, "db": layer.bias.grad,
            "mean": layer.running_mean, "var": layer.running_var}


def play(world):
    seen = {("norm", g, len(s)): norm_once(world, g, s) for g in GROUPS for s in SHAPES}
    x = world.part(drawn("rows", shape=(BATCH, C))).requires_grad_()
    every = world.gather_grad(x)
    loss = torch.logsumexp(x @ every.T, 1).mean()  # each row against all rows of the world, as in SimCLR
    loss.backward()
    order = torch.as_tensor(rng.permutation(rng.key(0, "order"), BATCH))
    dealt = world.shuffle(x.detach(), order)
    seen["grad"] = {"dx": x.grad / world.size}
    seen["rows"] = {"every": every.detach(), "back": world.unshuffle(dealt, order), "dealt": dealt,
                    "flags": world.gather(x.detach() > 0)}
    return seen


def main(folder):
    torch.set_num_threads(1)
    world = World.start("cpu", timeout_s=60)
    seen = play(world)
    seen["sum"] = world.sum(torch.tensor([float(world.rank), 1.0]))
    seen["max"] = world.maximum(torch.tensor([float(world.rank), 0.0])).result()
    seen["any"] = (world.any(world.rank == world.size - 1), world.any(False))
    seen["tell"] = (world.tell(f"rank {world.rank}, λ", 1), world.gather_text("x" * world.rank))

    def refuse():
        raise errors.DataError("a shard", got="nothing", expected="a shard", mend="write it")

    try:
        world.on_main(refuse)
    except errors.DataError as error:
        seen["refused"] = str(error)
    torch.save(seen, f"{folder}/{world.rank}.pt")
    world.close()


if __name__ == "__main__":
    main(sys.argv[1])
