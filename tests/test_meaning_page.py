"""docs/meaning.md has what tools/meaning.py prints, and each case has a test."""

import re
from pathlib import Path

import pytest

import meaning

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "meaning.md").read_text()
CASES = [case for cases in meaning.TITLES.values() for case in cases]
SLOW = (meaning.copying,)  # it trains a model


@pytest.mark.parametrize("case", CASES, ids=[case.what for case in CASES])
def test_each_case_names_a_test_that_there_is(case):
    file, _, name = case.test.partition("::")
    assert re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    "case",
    [pytest.param(each, id=each.what, marks=[pytest.mark.slow] if each.today in SLOW else []) for each in CASES],
)
def test_the_page_has_todays_value(case):
    assert meaning.row(case, case.today()) in PAGE.splitlines()
