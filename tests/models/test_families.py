"""Every family against transformers: logits and gradients packed and not, decoding, round trip, and read again."""

import pytest

from pronghorn.models import FAMILIES
from tests.models.family_checks import CASES, CHECKS, LIMITS, results


def test_every_family_has_a_case():
    assert sorted(CASES) == sorted(family.name for family in FAMILIES)


@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize("check", CHECKS)
def test_family_equals_transformers(family, check):
    worst = results(family)[check].worst
    assert worst <= LIMITS[check], f"{check}: {worst:.2e}"
