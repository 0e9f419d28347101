"""Every key of every recipe section is documented, and ``hpcssl show --comments`` prints the documentation."""

import dataclasses
import typing

import pytest
import yaml

from hpcssl import config, config_docs
from hpcssl.evals.options import EvalsOptions
from hpcssl.methods import METHODS
from hpcssl.train import recipe
from hpcssl.train.recipe import Recipe


def option_classes(schema):
    """Yield the class and the option classes of its fields, at any depth."""
    yield schema
    for hint in typing.get_type_hints(schema).values():
        if dataclasses.is_dataclass(hint):
            yield from option_classes(hint)


ROOTS = (Recipe, EvalsOptions, *(options for options, _ in METHODS.values()))
CLASSES = {cls for root in ROOTS for cls in option_classes(root)}


@pytest.mark.parametrize("cls", sorted(CLASSES, key=lambda cls: cls.__qualname__), ids=lambda cls: cls.__qualname__)
def test_every_field_is_documented(cls):
    docs = config_docs.field_docs(cls)
    assert list(docs) == [field.name for field in dataclasses.fields(cls)]
    for name, text in docs.items():
        assert text.endswith(".") and len(text) > 10, f"{cls.__qualname__}.{name}: {text!r}"


@dataclasses.dataclass
class Base:
    """A base.

    Attributes:
        first: One thing: with a colon,
            and a second line.
    """

    first: int = 1


@dataclasses.dataclass
class Derived(Base):
    """A class.

    Attributes:
        second: Another thing.

    Raises:
        third: Not a field.
    """

    second: str = "x"


def test_entries_are_inherited_and_may_have_several_lines():
    assert config_docs.field_docs(Derived) == {
        "first": "One thing: with a colon, and a second line.",
        "second": "Another thing.",
    }


def test_a_field_without_an_entry_is_an_error():
    bare = dataclasses.make_dataclass("Bare", [("third", int, 0)], bases=(Derived,))
    with pytest.raises(ValueError, match=r"Bare: .*\bthird\b"):
        config_docs.field_docs(bare)


@pytest.mark.parametrize("name", ["digits_msf", "digits_swav", "digits_cmsf_semi", "nnclr_r50_ep1000"])
def test_comments_do_not_change_values(name):
    composed = recipe.compose(name)
    text = config_docs.commented_yaml(composed, {"evals": EvalsOptions})
    assert yaml.safe_load(text) == yaml.safe_load(config.to_yaml(composed))
    lines = text.splitlines()
    line_number = lines.index(next(line for line in lines if line.startswith("  batch:")))
    assert lines[line_number - 1] == "  # " + config_docs.field_docs(type(composed.optim))["batch"]
    assert all(len(line) <= 110 for line in lines if line.lstrip().startswith("#"))
