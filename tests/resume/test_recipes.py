"""Every packaged recipe of the digits ends with the same bits when it is killed and resumed.

The recipes are those that `hpcssl recipes` lists under digits_. Each runs on two ranks (test_exact.py has 1, 2 and 4).
The killed run has a sharded bank and the undisturbed one a replicated bank, so that placement too changes no bit.
"""

import pytest

from hpcssl.files import read_lines
from hpcssl.run_dir import RunDir
from hpcssl.train import recipe

CASES = {name: (name, []) for name in recipe.names() if name.startswith("digits_")} | {
    "nnclr-current-encoder": ("digits_nnclr", ["method.neighbors.support=encoder", "bank.size=32"]),
    "swav-queue-in-use": ("digits_swav", ["method.queue_start_epoch=0", "method.freeze_steps=1"]),
    "nnsiam-micro-batches": ("digits_nnsiam", ["machine.accumulation_steps=2"]),
    "simclr-permutation": ("digits_simclr", ["mix.kind=cutmix", "mix.pairing=permutation"]),
}
QUICK = (
    "digits_byol",
    "digits_byol_bsim",
    "digits_cmsf_cross",
    "digits_cmsf_semi",
    "digits_moco_v2_wbsim",
    "digits_nnclr_mc",
    "nnclr-current-encoder",
    "swav-queue-in-use",
    "nnsiam-micro-batches",
    "simclr-permutation",
)
"""Cases of the quick suite: each kind of state that a method saves. test_exact.py has MSF, test_cmsf.py 2Q and KM."""
SHORT = ["model.norm=sync", "schedule.steps=4", "machine.log_steps=1"]


@pytest.fixture(scope="module")
def runs(request, run_scenarios):
    scenarios = []
    for name in CASES if request.config.getoption("--full") else QUICK:
        base, options = CASES[name]
        for kind, attempts, more in (
            ("undisturbed", [{}], ["machine.checkpoint_steps=0"]),
            ("killed", [{"kill_at": 3}, {}], ["bank.placement=sharded"]),
        ):
            scenarios.append(
                {
                    "name": f"{name}.{kind}",
                    "recipe": base,
                    "overrides": [*SHORT, *options, *more],
                    "worlds": [2],
                    "attempts": attempts,
                }
            )
    return run_scenarios(scenarios)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.full) for n in CASES])
def test_a_killed_run_with_a_sharded_bank_equals_an_undisturbed_one_with_a_replicated_bank(runs, name):
    (undisturbed, folder), (killed, killed_folder) = runs[f"{name}.undisturbed"], runs[f"{name}.killed"]
    assert undisturbed["done"] and killed["done"], undisturbed["log"] + killed["log"]
    assert [any(code == -9 for code in codes) for codes in killed["codes"]] == [True, False]
    assert killed["digest"] == undisturbed["digest"]
    losses = [[line["loss"] for line in read_lines(RunDir(f).journal)] for f in (folder, killed_folder)]
    assert losses[0] == losses[1] and len(set(losses[0])) > 1, "a run whose loss does not change proves nothing"
