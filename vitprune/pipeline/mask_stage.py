"""The mask stage: select the masks of the first pruning cycle from the scores."""

from typing import Any

from vitprune import models
from vitprune.config.params import Params
from vitprune.pipeline.artifacts import SCORES, write_masks
from vitprune.pipeline.project_data import METRICS, OUT, calibration, device
from vitprune.pruning.block_steps import next_block_removal
from vitprune.pruning.cycle_masks import (
    cost_model_for,
    cycle_target,
    groups_for,
    reached_cost,
    rescore_borderline,
    select_masks,
)
from vitprune.pruning.plan import plan_of
from vitprune.runtime.files import write_json


def run(params: Params) -> None:
    """Write the masks of the first cycle, and the scores that select them if borderline units were rescored."""
    plan = plan_of(params)
    model = models.load(OUT / "dense").to(device())
    groups, scores = groups_for(model, plan), models.read_weights(OUT / "score" / SCORES)
    costs = cost_model_for(model, groups, plan)
    wanted = cycle_target(scores, groups, plan, 1, costs)
    target = next_block_removal(groups, wanted.target)
    batches = calibration(model, params) if plan.row.settle else []
    rescored = rescore_borderline(model, batches, scores, groups, plan, target, costs=costs)
    masks = select_masks(rescored.scores, groups, plan, target, costs=costs, cycle=1)
    facts: dict[str, Any] = {"target": dict(target), "cost": reached_cost(masks, plan, 1, costs, wanted.last)}
    facts |= {"settled": dict(rescored.facts) or None} | write_masks(OUT / "mask", groups, masks)
    (OUT / "mask" / SCORES).unlink(missing_ok=True)
    if rescored.facts:
        models.write_weights(rescored.scores, OUT / "mask" / SCORES)
    write_json(METRICS / "mask.json", facts)
