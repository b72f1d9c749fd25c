"""Image sources, the manifest, the calibration table and loaders."""

from collections.abc import Sequence
from pathlib import Path

from vitprune.data.augment import AUGMENTATIONS, Transform, data_config, example_input, transform
from vitprune.data.calibration import draw_calibration, load_calibration
from vitprune.data.folder import open_folder
from vitprune.data.images import decode
from vitprune.data.loaders import (
    Batch,
    ImageTable,
    batch_count,
    batch_ids,
    batch_rows,
    eval_batches,
    open_split,
    train_batches,
)
from vitprune.data.manifest import Manifest, build_manifest
from vitprune.data.mixup_cutmix import MixFn, cutmix, make_mixer
from vitprune.data.parquet import open_parquet
from vitprune.data.sources import Source, SourceError, join, open_digits, source_hint
from vitprune.data.timm_datasets import open_timm
from vitprune.data.webdataset import open_webdataset
from vitprune.errors import BadInput

__all__ = [
    "AUGMENTATIONS",
    "Batch",
    "ImageTable",
    "Manifest",
    "MixFn",
    "Source",
    "Transform",
    "batch_count",
    "batch_ids",
    "batch_rows",
    "build_manifest",
    "cutmix",
    "data_config",
    "decode",
    "draw_calibration",
    "eval_batches",
    "example_input",
    "load_calibration",
    "make_mixer",
    "open_source",
    "open_split",
    "source_hint",
    "train_batches",
    "transform",
]


def open_source(
    spec: str, classes: Sequence[str] | None = None, eval_source: str | None = None, setting: str = SourceError.setting
) -> Source:
    """Open an image source.

    Args:
        spec: digits, folder:PATH, parquet:PATH, wds/PATH or a timm dataset name.
        classes: Class names by label; None to take those of the source.
        eval_source: A second source that provides the eval split.
        setting: Key or option that gave `spec`, for messages.

    Returns:
        The source.

    Raises:
        BadInput: the source is unknown, missing, empty or of another format.
    """
    source = _opened(spec, classes, setting)
    if eval_source is not None:
        source = join(source, _opened(eval_source, classes, "dataset.eval_source"))
    for name in (*source.ids, *(source.classes or ())):
        try:
            name.encode()
        except UnicodeEncodeError:
            raise BadInput(f"{source.spec}: the name {name} is not UTF-8; rename it") from None
    return source


def _opened(spec: str, classes: Sequence[str] | None, setting: str) -> Source:
    try:
        return _open(spec, classes)
    except SourceError as error:
        error.setting = setting
        raise


def _open(spec: str, classes: Sequence[str] | None) -> Source:
    kind, _, path = spec.partition(":")
    if kind in ("folder", "parquet") and not path:
        raise SourceError(f"{spec!r} lacks the path; write {kind}:PATH", first=True)
    if spec == "digits":
        return open_digits(classes)
    if kind == "folder":
        return open_folder(Path(path), classes)
    if kind == "parquet":
        return open_parquet(Path(path), classes)
    if spec.startswith("wds/"):
        return open_webdataset(spec, classes)
    return open_timm(spec, classes)
