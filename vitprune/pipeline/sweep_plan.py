"""A sweep's file as types, and the runs that it comes to: methods x targets, each with a params.yaml of its own."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag
from torch import nn

from vitprune import models
from vitprune.config.params import Kind, Params, checked, read
from vitprune.config.targets import Fraction, Section, Target
from vitprune.errors import BadInput
from vitprune.pipeline.dense_stage import initial_model
from vitprune.pruning.cost_target import COUNTS
from vitprune.pruning.cycle_masks import cost_model_for, groups_for
from vitprune.pruning.methods import method_named
from vitprune.pruning.plan import plan_of


def _form(goal: Any) -> str:
    """Which form a target has, so that an error speaks of that one; params.py leaves such names out of its keys."""
    if not isinstance(goal, Mapping | Target):
        return "function-sparsity"
    return "function-cost" if isinstance(goal, Target) or set(Target.model_fields) & set(goal) else "function-kinds"


SweepTarget = Annotated[
    Annotated[Fraction, Tag("function-sparsity")]
    | Annotated[dict[Kind, Fraction], Field(min_length=1), Tag("function-kinds")]
    | Annotated[Target, Tag("function-cost")],
    Discriminator(_form),
]
OWN = ("kinds", "scope", "heads")  # of prune: a method's own, unless the file says otherwise


class Sweep(Section):
    """What a sweep runs: every method at every target, and against what the results are drawn.

    `methods` are names, or names with settings of `prune` of their own; a target is a sparsity, sparsities per kind, or
    a cost as in `prune.target`. `params` are laid over params.yaml for all runs alike.
    """

    methods: (
        Annotated[list[str], Field(min_length=1)] | Annotated[dict[str, dict[str, Any] | None], Field(min_length=1)]
    )
    targets: Annotated[list[SweepTarget], Field(min_length=1)]
    params: dict[str, Any] = Field(default_factory=dict)
    against: Literal["throughput", "macs", "params"] = "throughput"


@dataclass(frozen=True)
class Run:
    """One run: its name, method and target in words, and the whole of its params.yaml."""

    name: str
    method: str
    target: str
    params: dict[str, Any]


def read_sweep(path: Path) -> Sweep:
    """Read and check a sweep's file.

    Raises:
        BadInput: the file is missing, is not YAML, or a key is unknown, missing or of a wrong type or value.
    """
    return checked(read(path, "give a file with methods and targets"), Sweep, path)


def runs_of(sweep: Sweep, params: Path) -> list[Run]:
    """Every method at every target on the settings of a params.yaml, in the file's order.

    Raises:
        BadInput: a method is unknown, a run's settings are none, its target does not fit the model, or two are alike.
    """
    given = sweep.methods if isinstance(sweep.methods, dict) else dict.fromkeys(sweep.methods)
    if len(given) < len(sweep.methods):
        raise BadInput(f"methods: {', '.join(sweep.methods)} names one twice; remove it")
    for method in given:
        method_named(method)
    base = _over(read(params, "run in a project directory (vitprune init DIR makes one)"), sweep.params)
    found = [_run(method, dict(own or {}), goal, base) for method, own in given.items() for goal in sweep.targets]
    names = [run.name for run in found]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise BadInput(f"targets: {twice[0]} is there twice; remove one")
    _refuse_misfits(found)
    return found


def _run(method: str, own: dict[str, Any], goal: Any, base: Mapping[str, Any]) -> Run:
    asked = _asked(goal)
    prune = dict.fromkeys(OWN) | {"method": method} | asked
    reserved = [key for key in ("method", "sparsity", "target") if key in own]
    if reserved:
        raise BadInput(f"methods.{method}.{reserved[0]}: is what the sweep itself sets; remove it")
    words = _words(asked)
    name = re.sub(r"[^a-z0-9.]+", "-", f"{method} {words}".lower()).strip("-")
    return Run(name, method, words, _over(base, {"prune": prune | own}))


def _asked(goal: Any) -> dict[str, Any]:
    if isinstance(goal, Target):
        return {"sparsity": None, "target": goal.costs}
    return {"sparsity": goal, "target": None}


def _words(asked: Mapping[str, Any]) -> str:
    """A target in words: sparsity 0.5, macs 0.5, ffn 0.6 attention 0.5."""
    amounts = asked["target"] or asked["sparsity"]
    if isinstance(amounts, Mapping):
        return " ".join(
            f"{what} {amount if isinstance(amount, str) else f'{amount:g}'}" for what, amount in amounts.items()
        )
    return f"sparsity {amounts:g}"


def _over(base: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with others laid over them, section by section; below a section a value replaces the whole one."""
    merged = dict(base)
    for key, value in more.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = {**merged[key], **value} if both else value
    return merged


def _refuse_misfits(runs: list[Run]) -> None:
    """Refuse what can be known before anything runs: settings that are none, and costs that the model cannot have."""
    plans = []
    for run in runs:
        with _naming(run):
            plans.append(plan_of(checked(run.params, Params, "params.yaml")))
    model = _shapes(checked(runs[0].params, Params, "params.yaml"))
    for run, plan in zip(runs, plans, strict=True):
        with _naming(run):
            groups = groups_for(model, plan)
            if not plan.target or next(iter(plan.target)) in COUNTS:  # a clock is asked when its turn comes
                cost_model_for(model, groups, plan)


@contextmanager
def _naming(run: Run) -> Iterator[None]:
    try:
        yield
    except BadInput as error:
        raise BadInput(f"run {run.name}: {error}") from None


def _shapes(params: Params) -> nn.Module:
    """The model of the runs; where it is a timm model, with random weights, since only shapes count here."""
    checkpoint = params.dense.checkpoint
    if params.dense.start == "checkpoint" and checkpoint is not None and checkpoint.is_dir():
        return initial_model(params).model
    return models.create(params.model.name, params.model.args, params.seed)
