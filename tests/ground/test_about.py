"""Every packaged recipe of a paper says where it differs from its original, and results repeat it."""

from importlib import resources

import pytest

from hpcssl import config
from hpcssl.results import page
from hpcssl.results.tables import FIRST
from hpcssl.train import recipe

OF_PAPERS = [name for name in recipe.names() if not name.startswith("digits_")]


@pytest.mark.parametrize("name", OF_PAPERS)
def test_a_recipe_of_a_paper_names_its_source_and_what_differs(name):
    """Its own file has the list, even if it is empty: the differences were looked for."""
    with resources.as_file(resources.files("hpcssl.recipes") / f"{name}.yaml") as path:
        own = config.read_yaml(path)["about"]
    about = recipe.compose(name).about
    assert own["source"] and isinstance(own["differs"], list)
    assert len(set(about.differs)) == len(about.differs)
    assert all(sentence[0].isupper() and sentence.endswith(".") for sentence in about.differs)


def test_a_recipe_goes_on_with_the_differences_of_its_base_unless_it_has_another_method():
    msf, large, km, simclr, bsim = (
        recipe.compose(name).about.differs
        for name in (
            "msf_r50_ep200_128k",
            "msf_r50_ep200_1m",
            "cmsf_km_r50_ep200_128k",
            "simclr_r50_ep200",
            "simclr_r50_ep200_bsim",
        )
    )
    assert large == msf and msf
    momentum, queue = (recipe.compose(f"nnclr_r50_ep1000_{name}").about.differs for name in ("momentum", "queue32k"))
    named = [sentence for sentence in queue if sentence.endswith("(method.momentum_encoder).")]
    assert len(named) == 1 and not set(named) & set(momentum), "it sets that key itself"
    assert bsim[: len(simclr)] == simclr and len(bsim) > len(simclr) > 0
    assert len(km) == len(set(km))


def test_measured_rows_repeat_what_differs_from_the_original():
    rows = [dict.fromkeys(FIRST, "") | {"recipe": name, "run": name} for name in ("simclr_r50_ep200", "digits_msf")]
    text = page.format_measured([], keep=rows)
    (note,) = [line for line in text.splitlines() if line.startswith("- simclr_r50_ep200: ")]
    assert all(sentence in note for sentence in recipe.compose("simclr_r50_ep200").about.differs)
    assert "- digits_msf: " not in text
