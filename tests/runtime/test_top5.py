"""Top-5 accuracy in tables for people."""

import pytest

from vitprune.models.card import _rows
from vitprune.orchestration.summary import rows
from vitprune.runtime.top5 import shows_top5


def evaluation(dense: float, pruned: float) -> dict:
    costs = {"params": 10, "nonzero_params": 10, "macs": 10, "nonzero_macs": 10}
    return {"dense": {"top1": 90.0, "top5": dense} | costs, "pruned": {"top1": 80.0, "top5": pruned} | costs}


@pytest.mark.parametrize(("dense", "pruned", "shown"), [(100, 100, False), (100, 99.5, True), (99.5, 100, True)])
def test_top5_is_shown_if_a_model_misses_an_image(dense: float, pruned: float, shown: bool) -> None:
    measured = evaluation(dense, pruned)
    assert shows_top5(measured) == shown
    assert ("top-5" in [name for name, *_ in rows(measured)]) == shown
    assert ("Top-5 accuracy, %" in [name for name, *_ in _rows(measured)]) == shown


def test_top5_is_not_shown_if_it_was_not_measured() -> None:
    assert not shows_top5({"dense": {"top1": 90.0}, "pruned": {"top1": 80.0}})
    assert not shows_top5({})
