"""Layers of nested values."""

from dataclasses import dataclass, field

import pytest

from hpcssl import config
from hpcssl.errors import ConfigError


@dataclass(frozen=True)
class Section:
    rate: float = 0.1
    sizes: list[int] = field(default_factory=lambda: [1, 2])


@dataclass(frozen=True)
class Options:
    section: Section = field(default_factory=Section)
    name: str = ""


@pytest.mark.parametrize(
    ("layers", "merged"),
    [
        ([{"a": {"x": 1, "y": 2}}, {"a": {"y": 3}, "b": 4}], {"a": {"x": 1, "y": 3}, "b": 4}),
        ([{"a": {"x": {"u": 1}}}, {"a": {"x": {"v": 2}}}], {"a": {"x": {"u": 1, "v": 2}}}),
        ([{"a": {"x": 1}}, {"a": None}], {"a": None}),
        ([{"a": None}, {"a": {"x": 1}}], {"a": {"x": 1}}),
        ([{"a": 5}, {"a": {"x": 1}}, {"a": {}}], {"a": {"x": 1}}),
        ([{"a": [1, 2, 3]}, {"a": [4]}], {"a": [4]}),
        ([], {}),
    ],
)
def test_later_layers_win_key_by_key(layers, merged):
    assert config.merge(*layers) == merged


def test_merged_values_are_copies():
    first, second = {"a": {"x": [1]}}, {"a": {"y": {"z": [2]}}}
    merged = config.merge(first, second)
    merged["a"]["x"].append(3)
    merged["a"]["y"]["z"].append(3)
    merged["a"]["new"] = 1
    assert (first, second) == ({"a": {"x": [1]}}, {"a": {"y": {"z": [2]}}})


def test_loading_changes_no_default_of_a_later_load():
    first = config.load(Options, {"section": {"rate": 1, "sizes": [7]}, "name": "a"})
    first.section.sizes.append(8)
    assert config.load(Options) == Options()
    config.load(Options).section.sizes.append(9)
    assert config.load(Options, {"name": "b"}) == Options(name="b")


@pytest.mark.parametrize("value", ["???", "${oc.env:HOME}", ["${name}"]])
def test_values_that_omegaconf_would_replace_are_refused(value):
    with pytest.raises(ConfigError) as refused:
        config.load(Options, {"section": {"sizes": value}})
    assert refused.value.what == "recipe, key section.sizes"
