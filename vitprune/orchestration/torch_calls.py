"""Functions of the pipeline that need torch, for `isolated.call`: strings as arguments, plain values as results.

Each imports what it needs: SciPy and Matplotlib, for comparisons and plots, take seconds too.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from vitprune.pipeline import stages


def compare_models(project: str, champion: str | None) -> dict[str, Any]:
    """Compare a project's final model with a saved one (None: the dense model) and apply gates.yaml."""
    from vitprune.pipeline import promotion

    params = stages.enter(Path(project))
    gates = promotion.load_gates(promotion.GATES)
    return promotion.compare_with_champion(params, None if champion is None else Path(champion), gates)


def plan_sweep(file: str, project: str) -> dict[str, Any]:
    """Check a sweep file against a project's model, and return its title, x-axis and runs."""
    from vitprune.pipeline import sweep_plan

    sweep = sweep_plan.read_sweep(Path(file))
    params = stages.enter(Path(project))
    runs = sweep_plan.runs_of(sweep, Path("params.yaml"))
    title = f"{params.model.name}: {len(sweep.methods)} methods x {len(sweep.targets)} targets"
    return {"title": title, "against": sweep.against, "runs": [asdict(run) for run in runs]}


def write_sweep_table(folder: str, out: str) -> None:
    """Write table and Pareto plot of a sweep's finished runs."""
    from vitprune.pipeline.report.sweep_table import write_sweep

    write_sweep(Path(folder), Path(out))
