"""The claims of the papers: they name rows that exist, and are decided by the seeds that both sides have."""

import json
from pathlib import Path

import pytest

from hpcssl.errors import ConfigError
from hpcssl.published.claims import read_claims
from hpcssl.results import claims, page
from hpcssl.results.command import main

FIRST, SECOND = "digits_cmsf_2q", "digits_msf"


def scores(ours, theirs, column="linear:msf_center"):
    sides = {FIRST: ours, SECOND: theirs}
    return {((name, ""), "digits"): {column: dict(enumerate(values))} for name, values in sides.items()}


def test_every_claim_names_settings_and_printed_rows_in_its_order():
    for claim in read_claims():
        assert claims.resolve_setting(claim.first) != claims.resolve_setting(claim.second), claim.claim
        _, difference = claim.printed()
        assert (difference is not None) == bool(claim.rows), f"{claim.claim}: a row or column is not printed"
        assert difference is None or difference > 0, claim.claim
        assert claim.rows or claim.note, claim.claim


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        ([92.0, 93.0, 94.1], [90.0, 91.0, 92.0], "holds"),
        ([90.0, 91.0, 92.0], [92.0, 93.0, 94.1], "does not hold here"),
        ([90.0, 95.0, 92.0], [92.0, 91.0, 91.0], "undecided"),
        ([92.0], [90.0], "undecided"),
        ([92.0], [92.0], "does not hold here"),
    ],
)
def test_a_claim_is_decided_by_difference_and_seeds(ours, theirs, verdict):
    by_claim = {one.claim.claim: one for one in claims.check_claims(scores(ours, theirs))}
    found = by_claim["CMSF-2Q over MSF"].comparisons["linear"]
    assert claims.decide(found) == verdict and found.seeds == list(range(len(ours)))
    assert not by_claim["NNCLR over SimCLR"].comparisons
    head, *lines = claims.claim_cells(list(by_claim.values()))
    cells = {line[0]: dict(zip(head, line, strict=True)) for line in lines}
    assert cells["CMSF-2Q over MSF"]["linear"].endswith(verdict)
    assert cells["CMSF-2Q over MSF"]["seeds"] == str(len(ours))
    assert cells["NNCLR over SimCLR"]["linear"] == claims.MISSING


def test_rows_of_a_page_and_changed_settings_are_matched(tmp_path):
    row = {"encoder": "trained", "data": "digits", "changed": "", "linear": "90.5", "seed": "1"}
    rows = [row | {"recipe": "digits_msf"}, row | {"recipe": "digits_msf", "changed": "method.k=1", "linear": "90.0"}]
    rows += [rows[1] | {"seed": "3 seeds"}, rows[1] | {"encoder": "untrained", "linear": "1.0"}]
    found = {one.claim.claim: one for one in claims.check_claims(claims.read_page_scores(rows))}
    comparison = found["Larger over smaller k (MSF over its k = 1)"].comparisons["linear"]
    assert comparison.difference == 0.5 and comparison.seeds == [1]
    text = page.format_claims(rows)
    assert text.count("+0.5, undecided") == 1 and claims.MISSING in text


def test_claims_are_written_to_a_page_once_and_exclude_other_output(tmp_path, capsys):
    sheet = tmp_path / "RESULTS.md"
    main([], claims=True, write=sheet)
    first = sheet.read_text()
    main([], claims=True, write=sheet)
    assert sheet.read_text() == first and first.count(page.CLAIMS_BEGIN) == 1
    for options in ({"claim": "a > b"}, {"as_csv": True}, {"published": True}):
        with pytest.raises(ConfigError):
            main([tmp_path], claims=True, **options)
    with pytest.raises(ConfigError):
        main([], claims=True)
    assert json.loads(claims.render_claims({}, as_json=True))[0]["data"] == ""


def test_the_claims_of_results_md_follow_from_its_measured_rows():
    sheet = Path(__file__).parents[2] / "RESULTS.md"
    assert page.format_claims(page.read_measured_rows(sheet)) in sheet.read_text(), "hpcssl results --claims --write"
