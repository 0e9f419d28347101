"""A stand-in for ``apex.optimizers`` of NVIDIA's apex, of the same interface, for machines without a GPU.

Its ``FusedSGD`` has the arguments, the state, the flag and the rules of apex/optimizers/fused_sgd.py and
csrc/multi_tensor_sgd_kernel.cu at the commit of requirements-apex.txt: parameters of other types than float16 and
float32 are left alone, a flag that is not 0 makes the kernel change nothing, and a missing momentum buffer is created.
"""

import sys
import types

import torch


class FusedSGD(torch.optim.Optimizer):
    def __init__(
        self,
        params,
        lr,
        momentum=0,
        dampening=0,
        weight_decay=0,
        nesterov=False,
        wd_after_momentum=False,
        materialize_master_grads=True,
        set_grad_none=False,
    ):
        options = {"lr": lr, "momentum": momentum, "dampening": dampening}
        super().__init__(params, options | {"weight_decay": weight_decay, "nesterov": nesterov})
        self._dummy_overflow_buf = torch.tensor([0], dtype=torch.int, device=self.param_groups[0]["params"][0].device)
        self.updates = 0

    def zero_grad(self):
        super().zero_grad()

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
        self.updates += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None or p.dtype not in (torch.float16, torch.float32):
                    continue
                is_first = "momentum_buffer" not in self.state[p]
                if is_first:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                if not self._dummy_overflow_buf.item():
                    self._kernel(p, self.state[p]["momentum_buffer"], group, is_first)

    def _kernel(self, p, moment, group, is_first):
        update = p.grad + group["weight_decay"] * p if group["weight_decay"] else p.grad.clone()
        if group["momentum"]:
            moment.copy_(update if is_first else moment * group["momentum"] + (1 - group["dampening"]) * update)
            update = update + group["momentum"] * moment if group["nesterov"] else moment
        p.sub_(group["lr"] * update)


def install(monkeypatch):
    """Make ``import apex.optimizers`` find the stand-in, and let it compute on a CPU."""
    apex, optimizers = types.ModuleType("apex"), types.ModuleType("apex.optimizers")
    apex.optimizers, optimizers.FusedSGD = optimizers, FusedSGD
    monkeypatch.setitem(sys.modules, "apex", apex)
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)
    monkeypatch.setattr("hpcssl.optim.apex_sgd.DEVICES", ("cpu", "cuda"))
