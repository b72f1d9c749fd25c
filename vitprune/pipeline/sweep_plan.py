"""Expand sweep.yaml into runs: methods x targets, each with its own params.yaml."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from vitprune.config.params import Params, checked, overlay, read_yaml
from vitprune.config.prune_config import Kind
from vitprune.config.quantity import format_cost
from vitprune.config.section import Fraction, Section
from vitprune.config.targets import Target
from vitprune.errors import BadInput
from vitprune.pipeline.check_settings import check_plan, model_to_prune
from vitprune.pruning.methods import method_named
from vitprune.pruning.plan import plan_of


def _form(target: Any) -> str:
    """Return the tag of a target's form, so that an error refers to that form; config.params drops such tags."""
    if not isinstance(target, Mapping | Target):
        return "function-sparsity"
    return "function-cost" if isinstance(target, Target) or set(Target.model_fields) & set(target) else "function-kinds"


SweepTarget = Annotated[
    Annotated[Fraction, Tag("function-sparsity")]
    | Annotated[dict[Kind, Fraction], Field(min_length=1), Tag("function-kinds")]
    | Annotated[Target, Tag("function-cost")],
    Discriminator(_form),
]
METHOD_DEFAULTS = ("kinds", "scope", "merge_heads_to")  # keys of prune that a run resets to the method's defaults


class Sweep(Section):
    """The settings of a sweep: sweep.yaml.

    Attributes:
        methods: Names of methods, or names with settings of `prune`.
        targets: Sparsities, sparsities per kind, or costs as in `prune.target`.
        params: Settings that replace those of params.yaml in all runs.
        against: Cost on the x axis of the plot.
    """

    methods: (
        Annotated[list[str], Field(min_length=1)] | Annotated[dict[str, dict[str, Any] | None], Field(min_length=1)]
    )
    targets: Annotated[list[SweepTarget], Field(min_length=1)]
    params: dict[str, Any] = Field(default_factory=dict)
    against: Literal["throughput", "macs", "params"] = "throughput"


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
        name: Name, usable as a file name.
        method: Name of the method.
        target: The target as text.
        params: Content of its params.yaml.
    """

    name: str
    method: str
    target: str
    params: dict[str, Any]


def read_sweep(path: Path) -> Sweep:
    """Read a sweep file.

    Raises:
        BadInput: the file is missing, is not YAML, or a key is unknown, missing or has an invalid type or value.
    """
    return checked(read_yaml(path, "give a file with methods and targets"), Sweep, path)


def runs_of(sweep: Sweep, params: Path) -> list[Run]:
    """Combine every method with every target on the settings of a params.yaml, in the order of the sweep file.

    Raises:
        BadInput: a method is unknown, the settings of a run are invalid or its target does not fit the model, or two
            runs are the same.
    """
    methods = sweep.methods if isinstance(sweep.methods, dict) else dict.fromkeys(sweep.methods)
    if len(methods) < len(sweep.methods):
        raise BadInput(f"methods: {', '.join(sweep.methods)} names one twice; remove it")
    for method in methods:
        method_named(method)
    base = overlay(read_yaml(params, "run in a project directory (vitprune init DIR makes one)"), sweep.params)
    runs = [
        _run(method, dict(settings or {}), target, base)
        for method, settings in methods.items()
        for target in sweep.targets
    ]
    names = [run.name for run in runs]
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise BadInput(f"targets: {repeated[0]} is there twice; remove one")
    _check(runs)
    return runs


def _run(method: str, settings: dict[str, Any], target: Any, base: Mapping[str, Any]) -> Run:
    reserved = [key for key in ("method", "sparsity", "target") if key in settings]
    if reserved:
        raise BadInput(f"methods.{method}.{reserved[0]}: is set by the sweep itself; remove it")
    goal = (
        {"sparsity": None, "target": target.costs | ({} if target.table is None else {"table": str(target.table)})}
        if isinstance(target, Target)
        else {"sparsity": target, "target": None}
    )
    prune = dict.fromkeys(METHOD_DEFAULTS) | {"method": method, "rotate_residual": False} | goal
    text = _as_text(goal)
    name = re.sub(r"[^a-z0-9.]+", "-", f"{method} {text}".lower()).strip("-")
    return Run(name, method, text, overlay(base, {"prune": prune | settings}))


def _as_text(goal: Mapping[str, Any]) -> str:
    """Return a target as text: sparsity 0.5, macs 0.5, ffn 0.6 attention 0.5."""
    amounts = goal["target"] or goal["sparsity"]
    if isinstance(amounts, Mapping):
        return " ".join(
            f"{name} {amount if isinstance(amount, str) else format_cost(amount)}" for name, amount in amounts.items()
        )
    return f"sparsity {amounts:g}"


def _check(runs: list[Run]) -> None:
    """Check before any run starts that all settings are valid and that the model can reach the targets."""
    plans = []
    for run in runs:
        with _naming(run):
            plans.append(plan_of(checked(run.params, Params, "params.yaml")))
    model = model_to_prune(checked(runs[0].params, Params, "params.yaml"))
    for run, plan in zip(runs, plans, strict=True):
        with _naming(run):
            check_plan(model, plan)


@contextmanager
def _naming(run: Run) -> Iterator[None]:
    try:
        yield
    except BadInput as error:
        raise BadInput(f"run {run.name}: {error}") from None
