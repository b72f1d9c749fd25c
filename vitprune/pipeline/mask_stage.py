"""The mask stage: select the masks of the first pruning cycle from the scores."""

from typing import Any

from vitprune import models
from vitprune.config.params import Params
from vitprune.pipeline.artifacts import SCORES, write_masks
from vitprune.pipeline.project_data import METRICS, OUT, calibration, device
from vitprune.pipeline.score_stage import load_prepared
from vitprune.pruning.allocation_search import allocated_cycle_masks
from vitprune.pruning.cycle_masks import cycle_state, reached_cost
from vitprune.pruning.held_out import fitted_images
from vitprune.pruning.plan import plan_of
from vitprune.runtime.files import write_json


def run(params: Params) -> None:
    """Write the masks of the first cycle, and the scores that select them if they are not those of the score stage."""
    plan = plan_of(params)
    model = load_prepared(plan).to(device())
    state = cycle_state(model, plan)
    needed = plan.method.rescore or plan.config.allocation
    batches = fitted_images(calibration(model, params), plan.config.reconstruct) if needed else []
    selected = allocated_cycle_masks(model, models.read_weights(OUT / "score" / SCORES), plan, state, batches)
    facts: dict[str, Any] = {"target": dict(selected.target), "cost": reached_cost(selected, plan, state)}
    facts |= {"rescoring": dict(selected.facts) or None, "allocation": dict(selected.allocation) or None}
    facts |= write_masks(OUT / "mask", state.groups, selected.masks)
    (OUT / "mask" / SCORES).unlink(missing_ok=True)
    if selected.facts or selected.allocation:
        models.write_weights(selected.scores, OUT / "mask" / SCORES)
    write_json(METRICS / "mask.json", facts)
