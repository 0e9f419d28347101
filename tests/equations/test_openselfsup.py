"""Initial weights and the gradient of OpenSelfSup, which BSIM's SimCLR and BYOL start from."""

import math

import pytest
import torch

from hpcssl.nets import resnet
from tests.tolerances import of_step

GPUS = 4


class GatherLayer(torch.autograd.Function):
    """Its gather: all rows are known, the backward pass returns the gradient of the GPU's own rows."""

    @staticmethod
    def forward(ctx, own, everything, gpu):
        ctx.gpu, ctx.rows = gpu, len(own)
        return everything.clone()

    @staticmethod
    def backward(ctx, gradient):
        first = ctx.gpu * ctx.rows
        return gradient[first : first + ctx.rows], None, None


def test_the_gather_of_openselfsup_gives_the_gradient_divided_by_the_gpus(small_training):
    """Every GPU computes the whole loss; the gradients of the weights are averaged over GPUs."""
    shipped = ["method.reduction=mean", "method.temperature=0.1", "model.joint_forward=true"]
    ours = small_training("digits_simclr", [*shipped, f"method.gradient_factor={1 / GPUS}"])
    plain = small_training("digits_simclr", shipped)
    pair, batch = plain.training.pair, ours.batch(0)
    x = plain.training.images(batch)
    z = torch.stack([z for z, _ in pair.embed(x)], 1).flatten(0, 1)  # the views of an image follow each other
    everything, total, loss = z.detach(), torch.zeros_like(z), 0.0
    for gpu in range(GPUS):
        leaf = z.detach().requires_grad_()
        rows = len(z) // GPUS
        gathered = GatherLayer.apply(leaf[gpu * rows : (gpu + 1) * rows], everything, gpu)
        logits = (gathered @ gathered.T / 0.1).fill_diagonal_(-math.inf)
        loss = torch.nn.functional.cross_entropy(logits, torch.arange(len(z)) ^ 1)
        loss.backward()
        total += leaf.grad / GPUS
    z.backward(total)
    gradients = {name: p.grad.clone() for name, p in pair.online.named_parameters()}
    before = {name: p.detach().clone() for name, p in ours.training.pair.online.named_parameters()}
    assert float(ours.step(batch).scalars["loss"]) == pytest.approx(float(loss.detach()), abs=of_step(1))
    (group,) = ours.training.optimizer.param_groups
    for name, p in ours.training.pair.online.named_parameters():
        moved = before[name] - group["lr"] * (gradients[name] + group["weight_decay"] * before[name])
        torch.testing.assert_close(p.detach(), moved, rtol=0, atol=of_step(1))


@pytest.mark.parametrize(
    ("rule", "std"), [("kaiming", lambda fan_in: math.sqrt(2 / fan_in)), ("normal", lambda _: 0.01)]
)
def test_initial_weights_of_openselfsup(rule, std):
    """Kaiming by the fan-in, or N(0, 0.01); biases 0; norms and the keys of the draws as before."""
    network = resnet.build(resnet.Arch(arch="resnet18"))
    network.fc = torch.nn.Linear(512, 256)
    resnet.initialize(network, 0, "x", rule)
    for part in network.modules():
        if isinstance(part, torch.nn.Conv2d | torch.nn.Linear):
            wanted, count = std(part.weight[0].numel()), part.weight.numel()
            assert float(part.weight.detach().std()) == pytest.approx(wanted, rel=5 / math.sqrt(2 * count))
            assert abs(float(part.weight.detach().mean())) < 5 * wanted / math.sqrt(count)
            assert part.bias is None or not part.bias.any()
    again = resnet.build(resnet.Arch(arch="resnet18"))
    again.fc = torch.nn.Linear(512, 256)
    resnet.initialize(again, 0, "x")
    ratio = (network.conv1.weight / again.conv1.weight).detach()  # torch: the same draws, scaled by the fan-out
    assert float(ratio.std()) < 1e-5 and float(ratio.mean()) == pytest.approx(
        std(147) / math.sqrt(2 / (64 * 49)), rel=1e-5
    )
