"""Select units of all kinds together by a latency table: least importance removed within a limit of time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vitprune.groups import Group, Masks, Scores
from vitprune.pruning.constraints import UNCONSTRAINED, Constraints
from vitprune.pruning.macs_scope import masks_before, removal_order

RESOLUTION = 4096  # steps of time between the least and the greatest latency
GroupTimes = Mapping[str, np.ndarray]  # by group: milliseconds by width, from width 0


@dataclass(frozen=True)
class WidthOptions:
    """Widths that a group may have.

    Attributes:
        widths: Numbers of units that remain.
        losses: Importance of the units that are removed, per width.
        milliseconds: Time of the group, per width.
    """

    widths: np.ndarray
    losses: np.ndarray
    milliseconds: np.ndarray


def select_by_latency(
    scores: Scores, share: float, groups: Sequence[Group], times: GroupTimes, previous: Masks, bounds: Constraints
) -> Masks:
    """Remove the units with the least importance in all, so that a share of the time that can be saved is saved.

    In every group the least important units are removed; dynamic programming over the groups finds how many of each.
    Every group keeps a unit (per head).

    Args:
        scores: Scores by group.
        share: Fraction to save of the time between all groups at their full width and all at width 1.
        groups: The groups.
        times: Milliseconds of each group by width.
        previous: Masks of the cycle before. Units that they remove remain removed.
        bounds: Constraints of single groups, as in `select`.

    Raises:
        BadInput: a score is NaN.

    Source: ZipLM (Kurtic et al. 2023): dynamic programming over a table of measured times.
    """
    masks = masks_before(groups, previous)
    orders, options = [], []
    for group in groups:
        order, importance = removal_order(group, scores[group.name], masks[group.name])
        left = order.shape[1]
        kept = bounds.get(group.name, UNCONSTRAINED).kept(group.shape[-1], left, protected=1)
        widths = np.array(kept)
        losses = np.concatenate([[0.0], importance.cumsum(dim=0).numpy()])[left - widths]
        orders.append(order)
        options.append(WidthOptions(widths, losses, times[group.name][widths]))
    fullest = sum(float(times[group.name][-1]) for group in groups)
    saving = sum(float(times[group.name][-1] - times[group.name][1]) for group in groups)
    for group, order, width in zip(groups, orders, best_widths(options, fullest - share * saving), strict=True):
        masks[group.name].view(-1)[order[:, : order.shape[1] - width].flatten()] = False
    return masks


def best_widths(options: Sequence[WidthOptions], limit: float) -> list[int]:
    """Return the width of every group with the least sum of losses, and a sum of times within a limit.

    Times are rounded up to a 4096th of the range of all sums, so the limit is never exceeded. If no choice is within
    the limit, every group takes its least time.

    Args:
        options: Widths of every group.
        limit: Largest sum of times, in milliseconds.
    """
    least = [float(group.milliseconds.min()) for group in options]
    spare = min(limit, sum(float(group.milliseconds.max()) for group in options)) - sum(least)
    step = max(spare, 0.0) / RESOLUTION
    total, choices = np.zeros(RESOLUTION + 1), []
    for group, shortest in zip(options, least, strict=True):
        above = group.milliseconds - shortest
        costs = np.ceil(above / step - 1e-9) if step else np.where(above > 0, np.inf, 0.0)
        best, choice = np.full(RESOLUTION + 1, np.inf), np.zeros(RESOLUTION + 1, dtype=np.int64)
        for number in np.flatnonzero(costs <= RESOLUTION):
            cost = int(costs[number])
            candidate = total[: RESOLUTION + 1 - cost] + group.losses[number]
            better = candidate <= best[cost:]  # of equal losses the widest
            best[cost:][better], choice[cost:][better] = candidate[better], number
        total = best
        choices.append((costs, choice))
    result, left = [], RESOLUTION
    for group, (costs, choice) in zip(reversed(options), reversed(choices), strict=True):
        number = choice[left]
        left -= int(costs[number])
        result.append(int(group.widths[number]))
    return result[::-1]
