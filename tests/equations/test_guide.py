"""The example in docs/tutorials/add_method.md trains. The code is taken from the page itself."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch.nn.functional as F

from hpcssl import methods
from hpcssl.errors import ConfigError
from tests.tolerances import of_step

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "tutorials" / "add_method.md"


@pytest.fixture
def midway(tmp_path, monkeypatch):
    text = GUIDE.read_text()
    source = next(block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "class Midway:" in block)
    (tmp_path / "midway.py").write_text(source)
    spec = importlib.util.spec_from_file_location("midway", tmp_path / "midway.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "midway", module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(methods.METHODS, "midway", (module.MidwayOptions, module.Midway))
    recipe = re.search(r"```yaml\n(.*?)```", text, re.S).group(1)
    (tmp_path / "digits_midway.yaml").write_text(recipe)
    return str(tmp_path / "digits_midway.yaml")


@pytest.mark.parametrize("overrides", [[], ["mix.kind=cutmix"]])
def test_the_example_trains(midway, small_training, overrides):
    run = small_training(midway, overrides)
    losses = [float(run.step(run.batch(step)).scalars["loss"]) for step in range(20)]
    assert losses[-1] < losses[0] - 0.3


def test_the_loss_of_the_example_is_its_formula(midway, small_training):
    run = small_training(midway, [])
    t = run.training
    query, target = t.images(run.batch(0))
    ((_, u),) = t.pair.embed([query])
    (v,) = t.pair.embed_target([target])
    bank = t.bank.all_rows("key")
    m = F.normalize(v + bank[(v @ bank.T).argmax(1)], dim=1)
    literal = float(((u - m) ** 2).sum(1).mean().detach())
    assert float(run.step(run.batch(0)).scalars["loss"]) == pytest.approx(literal, abs=of_step(1))


def test_the_table_of_the_guide_names_every_method():
    table = GUIDE.read_text()
    files = {module.__module__.rsplit(".", 1)[1] for _, module in methods.METHODS.values()}
    missing = [name for name in files if f"`{name}.py`" not in table]
    assert not missing, f"docs/tutorials/add_method.md does not show {missing}"


@pytest.mark.parametrize(("push", "views"), [("before", (0, 1)), ("before", ())])
def test_a_bank_that_is_fed_before_the_lookup_takes_one_view(push, views):
    with pytest.raises(ConfigError) as caught:
        methods.base.BankSpec(push=push, views=views)
    assert caught.value.what == "BankSpec.views" and str(views) in str(caught.value.got)
