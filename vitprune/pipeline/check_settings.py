"""Check the settings of a project against its model before the first stage runs, as far as training is not needed."""

import copy

from timm.optim import list_optimizers
from torch import nn

from vitprune import models
from vitprune.architectures.stream_rotation import stream_layers
from vitprune.config.params import Params
from vitprune.config.section import similar
from vitprune.errors import BadInput
from vitprune.pipeline.dense_stage import initial_model
from vitprune.pruning.cycle_masks import costs_for, groups_for
from vitprune.pruning.plan import Plan, plan_of
from vitprune.pruning.preparation import merging, narrowed


def check_settings(params: Params) -> None:
    """Check method, sparsity, target, rules, optimizers and the start of the dense model.

    Raises:
        BadInput: a setting does not fit the method or the model. The message names the key.
    """
    plan = plan_of(params)
    trainings = {"dense.train": params.dense.train, "prune.finetune": params.prune.finetune}
    for key, train in (trainings | {"distill.train": params.distill.train}).items():
        if train is not None and train.optimizer.lower().removeprefix("lookahead_") not in (known := list_optimizers()):
            hint = similar(train.optimizer, known) or "; timm.optim.list_optimizers() returns all names"
            raise BadInput(f"{key}.optimizer: {train.optimizer!r} is unknown to timm{hint}")
    check_plan(model_to_prune(params), plan)


def check_plan(model: nn.Module, plan: Plan) -> None:
    """Check that a model has the groups of a plan, and can reach its target.

    Without a table, latency is measured when the run prunes.

    Raises:
        BadInput: a kind, a rule, the target, the classes, the rotation or the merging of tokens does not fit the model.
    """
    if plan.config.rotate_residual:
        stream_layers(model)
    if plan.config.merge_tokens is not None or plan.config.classes is not None:
        model = merging(narrowed(copy.deepcopy(model), plan), plan)
    groups = groups_for(model, plan)
    if plan.config.target is None or not plan.config.target.is_measured:
        costs_for(model, groups, plan)


def model_to_prune(params: Params) -> nn.Module:
    """Return a model with the shapes of the dense model; its weights are random instead of timm's published ones."""
    if params.dense.start == "pretrained":
        return models.create(params.model.name, params.model.args, params.seed)
    return initial_model(params).model
