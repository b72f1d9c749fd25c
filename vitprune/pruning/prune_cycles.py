"""Prune a model cycle by cycle: scores, masks, weight update, removal of units, reconstruction and correction."""

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from vitprune.architectures.token_merging import without_merging
from vitprune.architectures.tracing.cache import shape_error
from vitprune.criteria import Batches, Statistics, Update
from vitprune.criteria.obs.channel_permutation import permutable_groups
from vitprune.errors import BadInput
from vitprune.groups import Group, Masks, Scores, permute
from vitprune.pruning.allocation_search import allocated_cycle_masks
from vitprune.pruning.apply_masks import apply_masks, copy_params
from vitprune.pruning.cycle_masks import CostReport, CycleState, cycle_state, given_masks, groups_for, reached_cost
from vitprune.pruning.held_out import fitted_images
from vitprune.pruning.norm_correction import correct_norms, dense_logits
from vitprune.pruning.plan import Plan
from vitprune.pruning.reconstruct import Reconstruction, reconstruct

NOT_RECONSTRUCTED = Reconstruction()
NO_ORDERS: Mapping[str, Tensor] = {}


@dataclass(frozen=True)
class Cycle:
    """A completed pruning cycle; masks and scores are indexed as in the dense model.

    Attributes:
        number: Number of the cycle, from 1.
        target: Sparsity per kind that was asked for.
        groups: Groups of the dense model.
        scores: Scores that selected the masks; empty if the masks were given.
        masks: Cumulative masks.
        cost: Target and reached cost, and why a miss is larger than 2 %; empty without a cost target.
        facts: Figures about rescoring.
        corrected: Figures about the correction of norms, on images that it did not use.
        reconstruction: Figures and curve of the reconstruction; empty without.
        allocation: Figures about the search for the sparsity of every group; empty without, or if masks were given.
    """

    number: int
    target: Mapping[str, float]
    groups: Sequence[Group]
    scores: Scores
    masks: Masks
    cost: CostReport = field(default_factory=dict)
    facts: Mapping[str, float] = field(default_factory=dict)
    corrected: Mapping[str, float] = field(default_factory=dict)
    reconstruction: Reconstruction = NOT_RECONSTRUCTED
    allocation: Mapping[str, float] = field(default_factory=dict)

    @property
    def zeroed(self) -> list[Group]:
        """Groups of single weights: the removed ones are zeros in the model, to be kept at zero in training."""
        return [group for group in self.groups if group.kind == "weight"]


@dataclass(frozen=True)
class ResumePoint:
    """Where an interrupted run continues.

    Attributes:
        dense: The dense model.
        number: The last completed cycle.
        masks: Its masks.
    """

    dense: nn.Module
    number: int
    masks: Masks


def prune_cycles(
    model: nn.Module,
    plan: Plan,
    batches: Batches,
    first: Masks | None = None,
    statistics: Statistics | None = None,
    resume: ResumePoint | None = None,
    orders: Mapping[str, Tensor] = NO_ORDERS,
    deadline: float | None = None,
) -> Iterator[Cycle]:
    """Prune a model in place, cycle by cycle; the caller may train it between two cycles.

    Args:
        model: The dense model, or the model after the cycle of `resume`.
        plan: The pruning plan.
        batches: Calibration batches.
        first: Masks of the first cycle, if they are known.
        statistics: Statistics of the criterion, for the weight update of a first cycle with known masks.
        resume: Where an interrupted run continues.
        orders: Orders of channels that belong to `first` and `statistics`, see `Importance.orders`.
        deadline: See `reconstruct`; the time until then is divided equally among the cycles.

    Yields:
        Every cycle after its pruning.
    """
    dense = model if resume is None else resume.dense
    all_tokens = without_merging(dense)
    runs, teachers = not shape_error(dense), [copy.deepcopy(all_tokens)] if plan.config.reconstruct else []
    fitted = fitted_images(batches, plan.config.reconstruct)
    state = cycle_state(dense, plan) if resume is None else cycle_state(dense, plan, resume.number + 1, resume.masks)
    logits = dense_logits(all_tokens, batches) if plan.config.correct_norms else []
    given = given_masks(first, plan, state) if first is not None and resume is None else None
    start, first_number = time.perf_counter(), state.number
    while state.number <= plan.config.cycles:
        complete = False
        while not complete:
            groups = groups_for(model, plan)
            if given is not None:
                selected, given = given, None
                reorder_channels([model, *teachers], orders)
                update = _update_for_given(model, groups, fitted, plan, state, statistics)
            else:
                importance = plan.method.criterion(model, groups, fitted, plan.context(state.number))
                reorder_channels([model, *teachers], importance.orders)
                selected = allocated_cycle_masks(model, importance.scores, plan, state, fitted)
                update = importance.update
            apply_masks(model, groups, selected.masks, state, update)
            state, complete = replace(state, masks=selected.masks), selected.complete
        if runs and (why := shape_error(model)):
            raise BadInput(f"{type(model).__name__}: the pruned model does not run ({why}); prune other kinds")
        share = (state.number - first_number + 1) / (plan.config.cycles - first_number + 1)
        limit = None if deadline is None else start + share * (deadline - start)
        reconstruction = _reconstruct(model, teachers, batches, plan, state.number, limit)
        corrected = _correct(model, logits, batches, plan, state.number)
        yield Cycle(
            number=state.number,
            target=selected.target,
            groups=state.groups,
            scores=selected.scores,
            masks=state.masks,
            cost=reached_cost(selected, plan, state),
            facts=selected.facts,
            corrected=corrected,
            reconstruction=reconstruction,
            allocation=selected.allocation,
        )
        state = replace(state, number=state.number + 1)


def reorder_channels(models: Sequence[nn.Module], orders: Mapping[str, Tensor]) -> None:
    """Re-order the channels of models of one structure in place, as a criterion's scores assume it."""
    for groups in permutable_groups(models[0]) if orders else ():
        for model in models:
            permute(model, groups, orders)


def _update_for_given(
    model: nn.Module,
    groups: Sequence[Group],
    batches: Batches,
    plan: Plan,
    state: CycleState,
    statistics: Statistics | None,
) -> Update | None:
    """Return the weight update of a cycle whose masks are given, from the statistics of its scoring if possible."""
    method, context = plan.method, plan.context(state.number)
    if method.recompute_update is not None:
        return method.recompute_update(model, groups, batches, context)
    if method.update_from_stats is None:
        return None
    if statistics:
        return method.update_from_stats(model, groups, statistics)
    # the masks are those of the model as it is: the criterion must not choose another order of its channels
    config = context.config.model_copy(update={"permute": False})
    return method.criterion(model, groups, batches, replace(context, config=config)).update


def _reconstruct(
    model: nn.Module, teachers: Sequence[nn.Module], batches: Batches, plan: Plan, number: int, deadline: float | None
) -> Reconstruction:
    """Reconstruct the model towards the dense one, if the plan says so."""
    if plan.config.reconstruct is None:
        return NOT_RECONSTRUCTED
    return reconstruct(model, teachers[0], batches, plan.config.reconstruct, plan.seed + number, deadline)


def _correct(
    model: nn.Module, logits: Sequence[Tensor], batches: Batches, plan: Plan, number: int
) -> Mapping[str, float]:
    """Correct norms and biases towards the dense model's logits, if the plan says so; return figures about it."""
    if not plan.config.correct_norms:
        return {}
    corrected = correct_norms(model, logits, batches, plan.context(number))
    copy_params(model, corrected.values)
    return corrected.facts
