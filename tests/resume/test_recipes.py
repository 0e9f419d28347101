"""Every packaged recipe of the digits, killed and resumed, ends in the same bits.

What `hpcssl recipes` lists under digits_ is discovered, not typed in. Two ranks each (test_exact.py has 1, 2 and 4);
the run that is killed keeps its bank sharded and the other one replicated, so that placement is shown to change no bit.
"""

import pytest

from hpcssl.files import RunDir, read_lines
from hpcssl.train import recipe

CASES = {name: (name, []) for name in recipe.names() if name.startswith("digits_")} | {
    "nnclr-present-encoder": ("digits_nnclr", ["method.neighbours.support=encoder", "bank.size=32"]),
    "swav-queue-in-use": ("digits_swav", ["method.queue_epoch=0", "method.freeze_steps=1"]),
    "nnsiam-micro-batches": ("digits_nnsiam", ["machine.accumulate=2"]),
    "simclr-permutation": ("digits_simclr", ["mix.kind=cutmix", "mix.pairing=permutation"]),
}
SHORT = ["model.norm=whole", "schedule.steps=4", "machine.log_steps=1"]


@pytest.fixture(scope="module")
def runs(play):
    plans = []
    for name, (base, options) in CASES.items():
        for kind, attempts, more in (("whole", [{}], ["machine.checkpoint_steps=0"]),
                                     ("killed", [{"kill_at": 3}, {}], ["bank.placement=sharded"])):
            plans.append({"name": f"{name}.{kind}", "recipe": base, "overrides": [*SHORT, *options, *more],
                          "worlds": [2], "attempts": attempts})
    return play(plans)


@pytest.mark.parametrize("name", CASES)
def test_killed_and_sharded_is_whole_and_replicated(runs, name):
    (whole, folder), (killed, torn) = runs[f"{name}.whole"], runs[f"{name}.killed"]
    assert whole["done"] and killed["done"], whole["log"] + killed["log"]
    assert [any(code == -9 for code in codes) for codes in killed["codes"]] == [True, False]
    assert killed["digest"] == whole["digest"]
    losses = [[line["loss"] for line in read_lines(RunDir(f).journal)] for f in (folder, torn)]
    assert losses[0] == losses[1] and len(set(losses[0])) > 1, "a run that does not move proves nothing"
