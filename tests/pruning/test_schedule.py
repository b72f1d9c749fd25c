"""Sparsity and learning rate over the cycles, against the literal values of CAP's recipes and against timm."""

import math

import pytest
import torch
from timm.scheduler import CosineLRScheduler
from torch import nn

from tests.support.plans import plan_for
from vitprune import BadInput
from vitprune.config.prune_config import Schedule
from vitprune.pruning.schedule import epochs_per_cycle, sparsities
from vitprune.training.lr_schedule import learning_rate

LONG = {0: 0.4, 20: 0.5, 40: 0.6, 60: 0.65, 80: 0.7, 100: 0.75, 120: 0.76667, 140: 0.78333, 160: 0.8, 180: 0.81667}
LONG |= {200: 0.83333, 220: 0.85, 240: 0.86667, 260: 0.88333, 280: 0.9}


def over(final: float, cycles: int, schedule: str | Schedule) -> list[float]:
    return [share["weight"] for share in plan_for("magnitude", final, cycles=cycles, schedule=schedule).targets()]


def test_a_shape_starts_from_the_dense_model() -> None:
    assert over(0.6, 3, "linear") == pytest.approx([0.2, 0.4, 0.6])
    assert over(0.8, 2, "cubic") == pytest.approx([0.7, 0.8])
    assert over(0.5, 1, "cubic") == [0.5]
    assert over(0.6, 3, Schedule(shape="linear")) == over(0.6, 3, "linear")


def test_initial_is_the_sparsity_of_the_first_cycle() -> None:
    cubic = [0.4, 0.47, 0.53, 0.58, 0.622, 0.657, 0.685, 0.706, 0.722, 0.734, 0.742, 0.747, 0.749, 0.75, 0.75]
    assert over(0.75, 15, Schedule(shape="cubic", initial=0.4)) == pytest.approx(cubic, abs=6e-4)
    assert over(0.9, 5, Schedule(shape="linear", initial=0.4)) == pytest.approx([0.4, 0.525, 0.65, 0.775, 0.9])
    assert over(0.9, 2, Schedule(shape="cubic", initial=0.0)) == [0.0, 0.9]


def test_steps_of_the_long_recipe_equal_its_phases() -> None:
    phases = [*sparsities(0.6, 3, "linear", 0.4), *sparsities(0.75, 3, "linear", 0.65)]
    phases += sparsities(0.9, 10, "linear", 0.75)[1:]
    assert over(0.9, 15, Schedule(steps=LONG)) == pytest.approx(phases, abs=1e-5)
    assert plan_for("magnitude", 0.9, cycles=15, schedule=Schedule(steps=LONG)).epochs(20) == [20] * 15


def test_steps_are_used_unchanged() -> None:
    steps = [0.5, 0.6, 0.75, 0.8, 0.9]
    assert over(0.9, 5, Schedule(steps=steps)) == steps
    plan = plan_for("magnitude", 0.75, cycles=4, schedule=Schedule(steps={0: 0.4, 30: 0.6, 60: 0.675, 70: 0.75}))
    assert plan.epochs(50) == [30, 30, 10, 50]
    assert plan_for("magnitude", 0.75, cycles=4).epochs(7) == [7] * 4


def test_a_target_follows_the_same_schedules() -> None:
    steps = plan_for(
        "channel-magnitude", None, cycles=3, schedule=Schedule(steps=[0.2, 0.3, 0.5]), target={"macs": 0.5}
    )
    assert [round(limit, 9) for limit in steps.cost_limits(0.5)] == [0.8, 0.7, 0.5]
    shape = Schedule(shape="linear", initial=0.1)
    started = plan_for("channel-magnitude", None, cycles=3, schedule=shape, target={"params": 0.5})
    assert started.cost_limits(0.5) == pytest.approx([0.9, 0.7, 0.5])


@pytest.mark.parametrize(
    ("cycles", "schedule", "why"),
    [
        (4, Schedule(steps=[0.5, 0.7, 0.9]), r"^prune.cycles 4: prune.schedule.steps has 3; give the same number"),
        (
            3,
            Schedule(steps=[0.5, 0.7, 0.8]),
            r"^prune.schedule.steps: ends at 0.8, the target sparsity is 0.9; give the same",
        ),
        (3, Schedule(steps=[0.7, 0.5, 0.9]), r"^prune.schedule.steps: \[0.7, 0.5, 0.9\] decreases"),
        (2, Schedule(steps={10: 0.5, 20: 0.9}), r"^prune.schedule.steps: prunes at epochs \[10, 20\]; begin with 0"),
        (3, Schedule(steps={0: 0.5, 20: 0.6, 10: 0.9}), r"prunes at epochs \[0, 20, 10\]"),
        (1, Schedule(shape="linear", initial=0.4), r"^prune.schedule.initial 0.4: give 2 cycles or more"),
        (3, Schedule(shape="linear", initial=0.95), r"^prune.schedule.initial 0.95: .* no more than 0.9"),
        (3, "sudden", r"^prune.schedule: Input should be 'linear' or 'cubic', got 'sudden'"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused(cycles: int, schedule: str | Schedule, why: str) -> None:
    with pytest.raises(BadInput, match=why) as refused:
        plan_for("magnitude", 0.9, cycles=cycles, schedule=schedule)
    assert "\n" not in str(refused.value)


def test_kinds_of_different_sparsities_have_no_common_steps() -> None:
    with pytest.raises(BadInput, match=r"^prune.schedule.steps: ends at 0.5, the target sparsity is 0.6"):
        plan_for("channel-magnitude", {"attention": 0.5, "ffn": 0.6}, cycles=2, schedule=Schedule(steps=[0.2, 0.5]))


def test_learning_rates_in_numbers() -> None:
    linear = [learning_rate(step, 5, 5e-4, 1e-5, 0, "linear") for step in range(5)]
    assert linear == pytest.approx([5e-4, 3.775e-4, 2.55e-4, 1.325e-4, 1e-5])  # the first step has the full rate
    cosine = [learning_rate(step, 4, 5e-4, 1e-5) for step in range(5)]
    middle = [1e-5 + 0.5 * 4.9e-4 * (1 + math.cos(math.pi / 4 * step)) for step in (1, 2, 3)]
    assert cosine == pytest.approx([5e-4, *middle, 1e-5])
    assert [learning_rate(step, 8, 0.4, 0.0, 4, "linear") for step in (0, 1, 3, 4)] == pytest.approx(
        [0, 0.1, 0.3, 0.4 * 3 / 7]
    )
    assert learning_rate(0, 1, 0.1, 0.01, 0, "linear") == 0.1
    with pytest.raises(BadInput, match=r"^decay 'sudden': unknown; use one of cosine, linear"):
        learning_rate(0, 1, 0.1, 0.0, 0, "sudden")


@pytest.mark.parametrize("warmup", [0, 3])
def test_cosine_decay_equals_timm(warmup: int) -> None:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.02)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=20, lr_min=0.001, warmup_t=warmup, warmup_lr_init=0.0, t_in_epochs=False
    )
    for step in range(22):
        scheduler.step_update(step)
        assert learning_rate(step, 20, 0.02, 0.001, warmup) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)


def test_spans_without_epochs_are_equal() -> None:
    assert epochs_per_cycle(None, 3, 5) == [5, 5, 5]
    assert epochs_per_cycle({0: 0.5}, 1, 5) == [5]
