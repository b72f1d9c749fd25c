"""Evaluate a saved timm model on an image source."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vitprune import data, models
from vitprune.data.images import why_unreadable
from vitprune.errors import BadInput
from vitprune.evaluation.evaluate import Metric, evaluate
from vitprune.runtime.wrappers import is_timm_model

BATCH_SIZE = 64


@dataclass(frozen=True)
class SourceBatches:
    """Batches (images, labels) of some rows of a source; can be iterated several times."""

    source: data.Source
    transform: data.Transform
    rows: list[int]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches.

        Raises:
            BadInput: an image cannot be read or decoded.
        """
        for first in range(0, len(self.rows), BATCH_SIZE):
            rows = self.rows[first : first + BATCH_SIZE]
            images = [self._image(self.source.ids[row]) for row in rows]
            yield torch.stack(images), torch.tensor([self.source.labels[row] for row in rows])

    def _image(self, image_id: str) -> Tensor:
        try:
            image = data.decode(self.source.read(image_id), self.transform.mode, self.transform.orient)
        except (MemoryError, BadInput):
            raise
        except Exception as error:  # of the file system, and of Pillow's decoders
            why = f"cannot be decoded ({why_unreadable(error)})"
            raise BadInput(f"{image_id}: {why}; repair it, or remove it from {self.source.spec}") from None
        return self.transform.image(image)


def evaluate_saved(
    directory: Path, spec: str, metric: Metric = "accuracy", dense: Path | None = None, threshold: float = 0.0
) -> dict[str, float]:
    """Return the result of `evaluate` for a saved model on an image source, with the model's own preprocessing.

    If the source has a train and an eval split, the eval split is evaluated, and knn compares with the train split.

    Args:
        directory: Directory written by `vitprune.save`.
        spec: Image source, such as folder:photos.
        metric: See `evaluate`.
        dense: Directory of the dense model.
        threshold: See `evaluate`.

    Raises:
        BadInput: a model or the source cannot be opened, the model is not timm's, or as `evaluate`.
    """
    model, other = models.load(directory), None if dense is None else models.load(dense)
    if not is_timm_model(model):
        name = type(model).__name__
        raise BadInput(f"{directory}: {name} has no preprocessing; give its own batches to vitprune.evaluate in Python")
    source = data.open_source(spec, setting="--data")
    splits = source.splits or ("eval",) * len(source.ids)
    transform = data.transform(data.data_config(model))
    batches, reference = (
        SourceBatches(source, transform, [row for row, name in enumerate(splits) if name == split])
        for split in ("eval", "train")
    )
    compared = reference if reference.rows and metric == "knn" else None
    return evaluate(model, batches, metric, dense=other, reference=compared, threshold=threshold)
