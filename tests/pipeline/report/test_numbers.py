import pytest

from vitprune.evaluation import paired_test
from vitprune.pipeline.report import numbers


def test_interval_without_disagreement_has_no_width() -> None:
    pairs = paired_test.McNemarTable(both=9, dense_only=0, pruned_only=0, neither=1)
    assert (pairs.difference, pairs.interval) == (0.0, (0.0, 0.0))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (1234, "1.23 k"), (999_600, "1.00 M"), (5_717_416, "5.72 M"), (1.254e9, "1.25 G")],
)
def test_counts_have_three_digits_and_a_unit(value: float, text: str) -> None:
    assert numbers.si_count("", value).text.replace("\N{NARROW NO-BREAK SPACE}", " ") == text


def test_interval_equals_the_wald_interval() -> None:
    pairs = paired_test.McNemarTable(both=341, dense_only=7, pruned_only=4, neither=8)
    assert pairs.images == 360
    assert pairs.difference == pytest.approx(-0.8333, abs=1e-4)
    assert pairs.interval == pytest.approx((-2.6370, 0.9703), abs=1e-4)


@pytest.mark.parametrize(("value", "text"), [(-0.5555, "-0.56"), (0.004, "0.00"), (-0.004, "0.00"), (0.5, "+0.50")])
def test_differences_have_a_sign(value: float, text: str) -> None:
    assert numbers.signed("", value, 2).text.replace("\N{MINUS SIGN}", "-") == text


def test_none_is_shown_as_a_dash() -> None:
    assert numbers.finite(float("nan")) is None
    assert numbers.relative_change("", 0, 5) == numbers.Quantity("", None, numbers.ABSENT)
