"""Every family against transformers: logits and gradients packed and not, decoding, round trip, and read again."""

import json

import pytest

from pronghorn.models import FAMILIES
from tests.models.family_checks import CASES, CHECKS, LIMITS, VARIANTS, results
from tests.models.write_table import DOCS, table


def test_every_family_has_a_case():
    assert sorted(CASES) == sorted(family.name for family in FAMILIES)


@pytest.mark.parametrize(
    ("family", "check"), [(name, check) for name in CASES | VARIANTS for check in CHECKS]
)
def test_family_equals_transformers(family, check):
    worst = results(family)[check].worst
    assert worst <= LIMITS[check], f"{check}: {worst:.2e}"


def test_the_table_is_of_these_families_and_checks_and_says_what_the_data_say():
    outcomes = json.loads((DOCS / "models.json").read_text())
    assert [(o["family"], o["model_type"], o["check"]) for o in outcomes] == [
        (name, CASES[name].model_type, check) for name in CASES for check in CHECKS
    ], "write it again with python -m tests.models.write_table"
    assert all(o["passed"] and o["worst"] <= LIMITS[o["check"]] for o in outcomes)
    assert (DOCS / "models.md").read_text().endswith(table(outcomes, CHECKS))
