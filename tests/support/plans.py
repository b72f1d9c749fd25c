"""Short forms for plans and scoring contexts."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vitprune import PruneConfig, ScoreConfig
from vitprune import plan_for as checked_plan
from vitprune.criteria import DEFAULT_CONTEXT, ScoringContext
from vitprune.pruning.plan import Plan


def plan_for(
    method: str,
    sparsity: float | Mapping[str, float] | None = None,
    scope: str | None = None,
    score: ScoreConfig = DEFAULT_CONTEXT.config,
    **options: Any,
) -> Plan:
    """Make a plan from the keys of `prune`."""
    return checked_plan(PruneConfig(method=method, sparsity=sparsity, scope=scope, **options), score)


def context(**options: Any) -> ScoringContext:
    """Make a scoring context from its own fields and from options of the criteria; `memory` is in bytes."""
    return changed(DEFAULT_CONTEXT, **options)


def changed(setting: ScoringContext, **options: Any) -> ScoringContext:
    """Change fields of a scoring context, or options of the criteria in it."""
    if "memory" in options:
        options["memory_mb"] = options.pop("memory") / (1 << 20)
    selected = {
        name: value for name, value in options.items() if name in ("seed", "first", "pattern", "dist", "partial")
    }
    config = ScoreConfig(
        **{**dict(setting.config), **{name: options[name] for name in options.keys() - selected.keys()}}
    )
    return replace(setting, config=config, **selected)
