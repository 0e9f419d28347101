"""Old names of keys and values are refused with the new name."""

import pytest

from hpcssl.config import Renames
from hpcssl.errors import ConfigError, ResumeError
from hpcssl.methods import METHODS
from hpcssl.train import recipe
from hpcssl.train.options import RENAMES

METHODS_WITH_KEY = {
    "all_allowed": "cmsf",
    "k_constraint": "cmsf",
    "num_clusters": "cmsf",
    "kmeans_iterations": "cmsf",
    "pseudo_labels": "cmsf",
    "rule": "cmsf",
    "sinkhorn_iterations": "swav",
    "queue_start_epoch": "swav",
    "neighbors": "nnclr",
    "temperature": "moco",
}
RECIPES = {"cmsf": "digits_cmsf_semi", "swav": "digits_swav", "nnclr": "digits_nnclr", "moco": "digits_moco_v2"}


def recipe_with_key(key):
    """Return the name of a recipe that has a (new) key."""
    section, name = key.split(".")[:2]
    return RECIPES[METHODS_WITH_KEY[name]] if section == "method" else "digits_msf"


def read_value(key):
    """Return the value of a (new) key in a recipe that has it."""
    value = recipe.compose(recipe_with_key(key))
    for name in key.split("."):
        value = getattr(value, name)
    return value


@pytest.mark.parametrize("old", [key for key in RENAMES.keys if "." in key])
def test_an_old_key_is_refused_with_the_new_name(old):
    new = RENAMES.keys[old]
    with pytest.raises(ConfigError) as caught:
        recipe.compose(recipe_with_key(new), [f"{old}=1"])
    assert caught.value.expected == new and caught.value.fix == f"write {new}=1"
    read_value(new)  # raises unless the new key exists


@pytest.mark.parametrize(("key", "old"), [(key, value) for key, values in RENAMES.values.items() for value in values])
def test_an_old_value_is_refused_with_the_new_name(key, old):
    new = RENAMES.values[key][old]
    with pytest.raises(ConfigError) as caught:
        recipe.compose(recipe_with_key(key), [f"{key}={old}"])
    assert caught.value.expected == repr(new) and caught.value.fix == f"write {key}={new}"


@pytest.mark.parametrize(
    ("old", "fix"),
    [
        ("optim.lr_place=inside", "write optim.lr_in_momentum=true"),
        ("optim.lr_per=absolute", "write optim.lr_scaling=none"),
        ("optim.lr_per=batch256", "write optim.lr_scaling=batch256"),
        ("method.pseudo.labeled=0.5", "write method.pseudo_labels=VALUE"),
    ],
)
def test_the_fix_contains_the_new_value(old, fix):
    with pytest.raises(ConfigError) as caught:
        recipe.compose("digits_cmsf_semi", [old])
    assert caught.value.fix == fix


def test_recipe_files_are_checked_too(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("like: digits_msf\n")
    with pytest.raises(ConfigError) as caught:
        recipe.compose(str(path))
    assert caught.value.expected == "base" and caught.value.fix == "write base=digits_msf"
    path.write_text("base: digits_msf\nmodel: {norm: whole}\n")
    with pytest.raises(ConfigError) as caught:
        recipe.compose(str(path))
    assert caught.value.fix == "write model.norm=sync"
    path.write_text("method: {name: msf}\nmachine: {keep: 2}\n")
    with pytest.raises(ResumeError) as resumed:  # a run folder of an earlier version
        recipe.read(path)
    assert "machine.keep" in resumed.value.what


def test_no_new_name_is_an_old_name_and_all_methods_are_covered():
    assert not set(RENAMES.keys) & set(RENAMES.keys.values())
    assert set(RECIPES) <= set(METHODS)
    for key, values in RENAMES.values.items():
        assert not set(values) & set(values.values()), key


def test_values_of_other_types_are_accepted():
    Renames(keys={"a.b": "a.c"}, values={"a.c": {"x": "y"}}).check({"a": {"c": ["x"], "d": None}}, "here")
