"""Record the latency table of a model in an engine on this machine."""

import copy
import datetime
import math
import re
import statistics
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from scipy.interpolate import UnivariateSpline
from torch import Tensor, nn

from vitprune import data, models
from vitprune.architectures import find_groups
from vitprune.config.prune_config import KINDS
from vitprune.errors import BadInput
from vitprune.evaluation.cost import group_costs
from vitprune.evaluation.engines import PACKAGES, check_engine, forward_call
from vitprune.evaluation.latency import alternating_times, environment
from vitprune.evaluation.latency_table import ADDITIVE, LatencyTable, write_latency_table
from vitprune.groups import Group, Masks, shrink
from vitprune.runtime.files import make_directory
from vitprune.runtime.progress import track

LEAST_ERROR = 1e-4  # of a ratio
PARTS = 5  # of the runs, for an estimate of lasting noise
STEPS = 8  # widths of every group: eighths of the dense model's, and 1


@dataclass(frozen=True)
class _Measurement:
    """Latency of a pruned model: median ratio to the dense one beside it, its standard error, and the dense median."""

    ratio: float
    error: float
    dense: float


def record_latency_table(
    model: nn.Module, engine: str, batch_size: int = 1, kinds: Sequence[str] = ("ffn", "attention"), runs: int = 50
) -> LatencyTable:
    """Measure the time of every group at several widths.

    All groups of one structure get a width together, because they take equally long and the difference from the dense
    model is then well above the noise of the clock. Every model is measured alternately with the dense one.

    Args:
        model: The dense model.
        engine: torch, ort or openvino.
        batch_size: Images per batch.
        kinds: Kinds of the groups: ffn, attention, head.
        runs: Forward passes of every measurement.

    Returns:
        The table. Its notes compare the model with every group at half of its width with the sum of the times.

    Raises:
        BadInput: the engine is unknown or not installed, or the model has no group of these kinds, or times of a kind
            do not add up, or the measured times contradict each other.
    """
    check_engine(engine)
    if wrong := [kind for kind in kinds if kind not in ADDITIVE]:
        why = "its times do not add up" if wrong[0] in KINDS else "unknown"
        raise BadInput(f"--kinds {wrong[0]!r}: {why}; use some of {', '.join(ADDITIVE)}")
    groups = find_groups(model, list(kinds))
    if not groups:
        raise BadInput(f"--kinds {','.join(kinds)}: the model has no group of these kinds; vitprune inspect lists them")
    images = data.example_input(model, batch_size)
    dense = forward_call(model, engine, images)

    def measured(widths: Mapping[str, int]) -> _Measurement:
        small = shrink(copy.deepcopy(model), groups, _masks(groups, widths))
        return _compared(forward_call(small, engine, images), dense, runs)

    classes = _structures(model, groups, images)
    points = [(same, width) for same in classes for width in _narrower(same[0].shape[-1])]
    half = {group.name: max(1, group.shape[-1] // 2) for group in groups}
    times = {
        (same[0].name, width): measured({group.name: width for group in same})
        for same, width in track(points, f"measuring in {engine}")
    }
    latency = statistics.median([measurement.dense for measurement in times.values()])
    by_name = {name: _times_of(same, times, latency) for same in classes for name in _names(same, groups)}
    table = LatencyTable(latency, by_name)
    try:
        by_table = table.fraction_at(table.all_times(groups), half)
    except BadInput as error:
        why = f"too few on a device that is busy ({error})"
        raise BadInput(f"--runs {runs}: {why}; use more, or an idle device") from error
    check = f"every group at half width: {measured(half).ratio:.3f} of the dense model's latency measured, "
    check += f"{by_table:.3f} by this table"
    return replace(table, notes=(_conditions(engine, next(model.parameters()).device, batch_size, runs), check))


def record_to_file(
    name: str, path: Path, engine: str, batch_size: int, kinds: Sequence[str], runs: int, threads: int | None
) -> str:
    """Record the table of a timm model or of a saved one into a file; return what it says about its own precision.

    Args:
        name: Name of a timm model, or directory of a saved model.
        path: The file.
        engine: As for `record_latency_table`; likewise the following.
        batch_size: Images per batch.
        kinds: Kinds of the groups.
        runs: Forward passes of every measurement.
        threads: CPU threads; None: as torch.

    Raises:
        BadInput: as `record_latency_table`, or the file cannot be written.
    """
    check_engine(engine)
    make_directory(path.parent)
    if path.is_dir():
        raise BadInput(f"--output {path}: is a directory; give a file such as {path / 'table.csv'}")
    if threads is not None:
        torch.set_num_threads(threads)
    model = models.load(name) if Path(name).is_dir() else models.create(name)
    if engine == "torch" and torch.cuda.is_available():
        model = model.cuda()
    table = record_latency_table(model, engine, batch_size, kinds, runs)
    write_latency_table(replace(table, notes=(name, *table.notes)), path)
    next_step = f"Next: set prune.target to {{latency: 0.5, table: {path}}}"
    return f"{path}: {table.milliseconds:.4g} ms; {table.notes[-1]}\n{next_step}"


def _narrower(width: int) -> list[int]:
    """Return the widths to measure below the full one: 1 and its eighths, from a width of 64 as multiples of 8."""
    multiple = 8 if width >= 8 * STEPS else 1
    return sorted({1, *(round(width * step / STEPS / multiple) * multiple for step in range(1, STEPS))} - {0, width})


def _masks(groups: Sequence[Group], widths: Mapping[str, int]) -> Masks:
    """Return masks that keep the first units; groups without a width keep all."""
    kept = {group.name: torch.arange(group.shape[-1]) < widths.get(group.name, group.shape[-1]) for group in groups}
    return {group.name: kept[group.name].expand(group.shape).contiguous() for group in groups}


def _compared(pruned: Callable[[], object], dense: Callable[[], object], runs: int) -> _Measurement:
    ours, theirs = alternating_times([pruned, dense], runs)
    ratios = np.array(ours) / np.array(theirs)
    ratio = min(float(np.median(ratios)), 1.0)  # above is noise
    return _Measurement(ratio, error_of_median(ratios), statistics.median(theirs))


def error_of_median(values: np.ndarray) -> float:
    """Return the standard error of the median of a series of measurements.

    It is the larger one of two estimates: from the quartiles, which is right for independent values, and from the
    medians of consecutive parts, which differ more if the noise lasts longer than a measurement.
    """
    low, high = np.percentile(values, [25, 75])
    independent = 1.253 * (high - low) / 1.349 / math.sqrt(len(values))  # factors of a normal distribution
    if len(values) < 2 * PARTS:
        return float(independent)
    medians = [np.median(part) for part in np.array_split(values, PARTS)]
    return max(float(independent), float(np.std(medians, ddof=1)) / math.sqrt(PARTS))


def smoothed(values: Mapping[int, float], errors: Mapping[int, float]) -> dict[int, float]:
    """Return the smoothest values by width that agree with the measured ones within their standard errors.

    The sum of the squared deviations, relative to the errors, is at most the number of widths. A search for the best
    widths would otherwise prefer those whose measurement is too low by chance.
    """
    widths = sorted(values)
    weights = [1 / max(errors[width], LEAST_ERROR) for width in widths]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FITPACK's, if fewer knots do not fit better
        spline = UnivariateSpline(widths, [values[width] for width in widths], weights, k=1, s=len(widths))
    return {width: float(spline(width)) for width in widths}


def _structures(model: nn.Module, groups: Sequence[Group], images: Tensor) -> list[list[Group]]:
    """Return the groups that have the same shapes and MACs, and therefore take equally long."""
    costs, classes = group_costs(model, groups, images), defaultdict[object, list[Group]](list)
    for group in groups:
        classes[(group.kind, group.shape, costs[group.name])].append(group)
    return list(classes.values())


def _times_of(same: Sequence[Group], times: Mapping[tuple[str, int], _Measurement], dense: float) -> dict[int, float]:
    """Return by width how many milliseconds each of several equal groups adds to the model with the smallest width."""
    name, full = same[0].name, same[0].shape[-1]
    measured = {width: entry for (first, width), entry in times.items() if first == name}
    ratios = {width: entry.ratio for width, entry in measured.items()} | {full: 1.0}
    shares = smoothed(ratios, {width: entry.error for width, entry in measured.items()} | {full: 0.0})
    least = min(shares.values())
    return {width: dense * (share - least) / len(same) for width, share in shares.items()}


def _names(same: Sequence[Group], groups: Sequence[Group]) -> list[str]:
    """Return one pattern if it matches exactly the groups of a class, else their names."""
    names = [group.name for group in same]
    pieces = [re.split(r"(\d+)", name) for name in names]
    if len({len(split) for split in pieces}) > 1:
        return names
    pattern = "".join(values[0] if len(set(values)) == 1 else "*" for values in zip(*pieces, strict=True))
    others = [group.name for group in groups if group not in same]
    return names if any(fnmatchcase(name, pattern) for name in others) else [pattern]


def _conditions(engine: str, device: torch.device, batch_size: int, runs: int) -> str:
    """Describe the measurement."""
    package, facts, threads = import_module(PACKAGES[engine]), environment(device), torch.get_num_threads()
    processor = facts["cpu"] if device.type == "cpu" else facts["device"]
    return (
        f"{package.__name__} {package.__version__}, batch size {batch_size}, {threads} thread{'s' * (threads > 1)}, "
        f"medians of {runs} runs, {processor}, {datetime.date.today().isoformat()}"
    )
