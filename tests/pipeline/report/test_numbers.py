import pytest

from vitprune.evaluation import paired_test
from vitprune.pipeline.report import numbers


def pairs(both: int, dense_only: int, pruned_only: int, neither: int) -> paired_test.McNemarTable:
    return paired_test.McNemarTable(both, dense_only, pruned_only, neither)


def test_interval_equals_newcombes_example() -> None:
    # Newcombe 1998, table II, method 10
    assert pairs(36, 2, 12, 0).interval == pytest.approx((5.69, 34.04), abs=5e-3)
    assert pairs(36, 12, 2, 0).interval == pytest.approx((-34.04, -5.69), abs=5e-3)
    assert pairs(9, 0, 0, 1).interval == pytest.approx(
        (-27.76, 27.76), abs=5e-3
    )  # the width is zero only with all images
    large = pairs(34_100, 700, 400, 800)
    assert large.interval == pytest.approx((-1.013, -0.653), abs=1e-2)  # Wald's, which holds for many images
    for extreme in (pairs(10, 0, 0, 0), pairs(0, 0, 0, 10), pairs(0, 10, 0, 0), pairs(0, 5, 5, 0), pairs(1, 0, 0, 0)):
        low, high = extreme.interval
        assert -100 <= low <= extreme.difference <= high <= 100


def test_few_discordant_images_are_not_significant() -> None:
    few = pairs(50, 5, 0, 5)
    assert (few.p_different, few.p_worse) == (2 / 2**5, 1 / 2**5)
    assert pairs(50, 6, 0, 4).p_different == 2 / 2**6
    assert pairs(9, 0, 0, 1).p_different == 1.0


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (1234, "1.23 k"), (999_600, "1.00 M"), (5_717_416, "5.72 M"), (1.254e9, "1.25 G")],
)
def test_counts_have_three_digits_and_a_unit(value: float, text: str) -> None:
    assert numbers.si_count("", value).text.replace("\N{NARROW NO-BREAK SPACE}", " ") == text


@pytest.mark.parametrize(("value", "text"), [(-0.5555, "-0.56"), (0.004, "0.00"), (-0.004, "0.00"), (0.5, "+0.50")])
def test_differences_have_a_sign(value: float, text: str) -> None:
    assert numbers.signed("", value, 2).text.replace("\N{MINUS SIGN}", "-") == text


def test_none_is_shown_as_a_dash() -> None:
    assert numbers.finite(float("nan")) is None
    assert numbers.relative_change("", 0, 5) == numbers.Quantity("", None, numbers.ABSENT)
