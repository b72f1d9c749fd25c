"""Compare the outputs of a stage that was run again with the recorded ones; yield one message per difference.

Whole numbers, texts and masks must be equal. Real numbers may differ by rounding: another CPU adds in another order.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor

from vitprune import models
from vitprune.errors import BadInput
from vitprune.runtime.files import read_csv, read_json, sha256
from vitprune.runtime.messages import Note

Lines = Iterator[str]
Row = Mapping[str, Any]
ROUNDING = 1e-4  # relative; for a tensor, of its largest value


def compare_outputs(recorded: Path, again: Path, names: Sequence[str]) -> Lines:
    """Compare files and folders.

    Args:
        recorded: Directory of the recorded outputs.
        again: Directory of the outputs of the second run.
        names: Paths of the outputs in both; of a folder every file is compared.
    """
    files = [sorted(name for path in names for name in _files(root, path)) for root in (recorded, again)]
    yield from (f"{name}: is missing after running the stage again" for name in files[0] if name not in files[1])
    yield from (f"{name}: is missing; running the stage again writes it" for name in files[1] if name not in files[0])
    common = [name for name in files[0] if name in files[1] and sha256(recorded / name) != sha256(again / name)]
    # digests of files that differ by rounding, in the metrics and cards that name them
    digests = {sha256(again / name): sha256(recorded / name) for name in common}
    for name in common:
        try:
            yield from _compare(name, recorded / name, again / name, digests)
        except (BadInput, ValueError, TypeError, OSError) as error:
            yield f"{name}: cannot be read ({' '.join(str(error).split())[:200]})"


def _files(root: Path, name: str) -> Iterator[str]:
    path = root / name
    below = path.rglob("*") if path.is_dir() else [path]
    return (file.relative_to(root).as_posix() for file in below if file.is_file())


def _compare(name: str, recorded: Path, again: Path, digests: Mapping[str, str]) -> Lines:
    match recorded.suffix:
        case ".parquet":
            pair = [pq.read_table(path).to_pylist() for path in (recorded, again)]
            yield from compare_rows(name, *pair)
        case ".json":
            yield from compare_facts(name, read_json(recorded), read_json(again), digests)
        case ".csv":
            yield from compare_rows(name, numbers(recorded), numbers(again))
        case ".safetensors":
            yield from _compare_tensors(name, models.read_weights(recorded), models.read_weights(again))
        case ".onnx" | ".data" | ".pt2" | ".xml" | ".bin":
            yield Note(f"{name}: has other bytes than the file exported again; the stage compares its logits")
        case _:
            text = _text(again)
            for digest, wanted in digests.items():
                text = text.replace(digest, wanted)
            if text != _text(recorded):
                yield f"{name}: differs from the file that the stage writes from the recorded inputs"


def _text(path: Path) -> str:
    """Read a text, but of a report without its commit: a cached report shows that of the run that computed it."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(line for line in lines if 'data-name="commit"' not in line)


def _compare_tensors(name: str, recorded: Mapping[str, Tensor], again: Mapping[str, Tensor]) -> Lines:
    for key in sorted(recorded.keys() | again.keys()):
        before, after = recorded.get(key), again.get(key)
        if before is None or after is None or (before.shape, before.dtype) != (after.shape, after.dtype):
            yield f"{name}: {key} is missing or has another shape or type than computed again"
        elif before.dtype.is_floating_point:
            tolerance = ROUNDING * float(after.abs().max()) if after.numel() else 0.0
            if not torch.allclose(before, after, rtol=0, atol=tolerance, equal_nan=True):
                difference = float((before - after).abs().max())
                yield f"{name}: {key} differs by up to {difference:.3g} from the tensor computed again"
        elif not before.equal(after):
            yield f"{name}: {key} has {int((before != after).sum())} other values than computed again"


def compare_rows(name: str, recorded: Sequence[Row], again: Sequence[Row]) -> Lines:
    """Compare the rows of a table with those computed again."""
    if len(recorded) != len(again):
        yield f"{name}: has {len(recorded)} rows, computed again {len(again)}"
    for number, (row, expected) in enumerate(zip(recorded, again, strict=False)):
        label = expected.get("id") or expected.get("group")
        yield from compare_facts(f"{name}: row {number}" + (f" ({label})" if label else ""), row, expected)


def compare_facts(label: str, recorded: Row, again: Row, digests: Mapping[str, str] | None = None) -> Lines:
    """Compare the values that were computed again with the recorded ones.

    Args:
        label: Name of the file, for the messages.
        recorded: Recorded values.
        again: Values computed again; recorded ones of other keys are not compared.
        digests: Recorded checksums that stand for others, of files that differ by rounding.
    """
    for key, value in again.items():
        if not _same(recorded.get(key), value, digests or {}):
            yield f"{label}: {key} is {_shortened(recorded.get(key))}, computed again {_shortened(value)}"


def compare_file(path: Path, again: Row) -> Lines:
    """Compare the values that were computed again with those of a JSON file."""
    yield from compare_facts(str(path), read_json(path), again)


def _same(recorded: Any, again: Any, digests: Mapping[str, str]) -> bool:
    if isinstance(recorded, Mapping) and isinstance(again, Mapping):
        return recorded.keys() == again.keys() and all(
            _same(recorded[key], again[key], digests) or (key == "max_abs_diff" and _same_difference(recorded, again))
            for key in again
        )
    if isinstance(again, list) and isinstance(recorded, list):
        return len(again) == len(recorded) and all(map(_same, recorded, again, [digests] * len(again)))
    if isinstance(again, float) and isinstance(recorded, float | int):
        close = math.isclose(recorded, again, rel_tol=ROUNDING, abs_tol=1e-5)
        return close or (math.isnan(recorded) and math.isnan(again))
    if isinstance(again, str):
        again = digests.get(again, again)
    return bool(recorded == again)


def _same_difference(recorded: Row, again: Row) -> bool:
    """Return whether the recorded difference of an exported file's logits is right within a tenth of its bound."""
    bound = again.get("bound")
    values = [row["max_abs_diff"] for row in (recorded, again)]
    is_number = all(isinstance(value, float) and value >= 0 for value in values)
    return isinstance(bound, float) and is_number and abs(values[0] - values[1]) <= bound / 10


def _shortened(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 100 else f"{text[:60]}... ({len(text)} characters)"


def numbers(path: Path) -> list[dict[str, Any]]:
    """Read a CSV file without its empty cells, numbers as numbers."""
    return [{name: _number(text) for name, text in row.items() if text != ""} for row in read_csv(path)]


def _number(text: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
