"""timm datasets as image sources: hfds/... (Hugging Face) and torch/... (torchvision)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from timm.data import ImageDataset, create_dataset

from vitprune.data.images import encode
from vitprune.data.sources import MAX_LABEL, Source, SourceError, missing_image, source_hint
from vitprune.data.split_names import EVAL_SPLITS
from vitprune.runtime.messages import first_line, without_retry_lines

STREAMS = ("hfids", "tfds")


@dataclass(frozen=True, eq=False)
class TimmReader:
    """Reads images of timm datasets by split and row; decoded images are encoded as PNG."""

    spec: str
    datasets: dict[str, Any]

    def __call__(self, image_id: str, /) -> bytes:
        """Return the bytes of row ROW of split SPLIT, for the id SPLIT#ROW."""
        split, _, digits = image_id.partition("#")
        if split not in self.datasets or not digits.isdecimal() or int(digits) >= len(self.datasets[split]):
            raise missing_image(image_id, self.spec)
        dataset = self.datasets[split]
        if isinstance(dataset, ImageDataset):
            with dataset.reader[int(digits)][0] as file:
                return bytes(file.read())
        return encode(dataset[int(digits)][0])


def open_timm(spec: str, classes: Sequence[str] | None) -> Source:
    """Open a timm dataset: its train split, and validation (val, test) if there is one.

    Args:
        spec: NAME or NAME:ROOT.
        classes: Class names by label; None for those of the dataset.

    Returns:
        The source.

    Raises:
        BadInput: unknown name, missing package, or a streaming dataset, which cannot be read by row.
    """
    name, _, root = spec.partition(":")
    prefix = name.partition("/")[0].lower()
    if prefix in STREAMS:
        raise SourceError(
            f"{spec} is a stream, which cannot be read by row; store it as parquet:PATH or use hfds/", first=True
        )
    if prefix not in ("hfds", "torch") or "/" not in name:
        raise SourceError(f"{spec!r} is unknown; {source_hint(spec)}", first=True)
    if name.lower() in ("torch/folder", "torch/image_folder"):
        raise SourceError(f"{spec} is an image folder; write folder:{root or 'PATH'}", first=True)
    with without_retry_lines():
        datasets = {"train": _create(spec, name, root, "train")} | _evaluation(name, root)
    labels_of, names = _labels(spec, datasets, classes)
    rows = [(split, row, label) for split, labels in labels_of.items() for row, label in enumerate(labels)]
    ids, labels = tuple(f"{split}#{row}" for split, row, _ in rows), tuple(label for _, _, label in rows)
    splits = tuple("train" if split == "train" else "eval" for split, _, _ in rows) if len(datasets) == 2 else None
    return Source(spec, ids, labels, names, splits, TimmReader(spec, datasets))


def _create(spec: str, name: str, root: str, split: str) -> Any:
    try:
        return create_dataset(name, root=root or None, split=split)
    except ImportError:
        raise SourceError(f"{spec} needs the package datasets; run `pip install datasets`", first=True) from None
    except Exception as error:  # readers, network and packages raise various errors
        raise SourceError(f"{spec} cannot be opened: {first_line(error)}", first=True) from None


def _evaluation(name: str, root: str) -> dict[str, Any]:
    for split in EVAL_SPLITS:
        try:
            return {split: create_dataset(name, root=root or None, split=split)}
        except (ValueError, KeyError):  # raised by Hugging Face and torchvision for an unknown split
            continue
    return {}


def _labels(
    spec: str, datasets: dict[str, Any], classes: Sequence[str] | None
) -> tuple[dict[str, list[int]], tuple[str, ...] | None]:
    names = tuple(classes) if classes is not None else _names(datasets["train"])
    labels_of: dict[str, list[int]] = {}
    for split, dataset in datasets.items():
        # torchvision datasets have no common access to labels except reading the rows
        rows = dataset.reader.iter_targets() if isinstance(dataset, ImageDataset) else (row[1] for row in dataset)
        try:
            labels_of[split] = [int(label) for label in rows]
        except Exception as error:  # readers raise various errors
            raise SourceError(
                f"{spec} has labels that are not integers ({first_line(error)}); store it as parquet:PATH", first=True
            ) from None
        worst = max(labels_of[split], default=0)
        if min(labels_of[split], default=0) < 0 or worst >= (MAX_LABEL if names is None else len(names)):
            raise SourceError(
                f"{spec}, split {split}, has labels outside its classes; check dataset.classes", first=True
            )
    return labels_of, names


def _names(dataset: Any) -> tuple[str, ...] | None:
    if not isinstance(dataset, ImageDataset) or not dataset.reader.class_to_idx:
        return None
    by_name: dict[str, int] = dataset.reader.class_to_idx
    return tuple(str(name) for name in sorted(by_name, key=lambda name: by_name[name]))
