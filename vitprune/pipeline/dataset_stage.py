"""The dataset stage: hash every image and write the manifest of the train and eval splits."""

from collections.abc import Sequence
from typing import Any

from vitprune import data
from vitprune.config.params import Params
from vitprune.errors import BadInput
from vitprune.pipeline.project_data import MANIFEST, METRICS, source_of
from vitprune.runtime import tables
from vitprune.runtime.files import sha256, write_json


def run(params: Params) -> None:
    """Write the manifest and metrics/dataset.json."""
    source = source_of(params)
    if source.left_out:
        print(f"{source.spec}: {len(source.left_out)} files or folders are left out: {_few(source.left_out)}")
    manifest = manifest_of(source, params)
    if manifest.skipped:
        print(f"{source.spec}: {len(manifest.skipped)} images cannot be read: {_few(manifest.skipped)}")
    tables.write_table(manifest.rows, tables.MANIFEST, MANIFEST)
    write_json(METRICS / "dataset.json", dataset_facts(source, manifest, params))


def _few(names: Sequence[str]) -> str:
    """Return the first names, shortened and printable."""
    return str(BadInput(", ".join(names[:8]) + (", ..." if len(names) > 8 else "")))


def manifest_of(source: data.Source, params: Params) -> data.Manifest:
    """Read every image of a source and assign it to a split, as the `dataset` settings say."""
    settings = params.dataset
    return data.build_manifest(
        source, settings.eval_fraction, params.seed, settings.skip_limit, settings.exif_orientation
    )


def dataset_facts(source: data.Source, manifest: data.Manifest, params: Params) -> dict[str, Any]:
    """Return the content of metrics/dataset.json: classes, size of the splits, checksum of the written manifest."""
    splits = [row["split"] for row in manifest.rows]
    return {
        "source": params.dataset.source,
        "classes": len({row["label"] for row in manifest.rows}),
        "class_names": None if source.classes is None else list(source.classes),
        "train": splits.count("train"),
        "eval": splits.count("eval"),
        "skipped": len(manifest.skipped),
        "overlap": manifest.overlap,
        "oriented": manifest.oriented,
        "left_out": len(source.left_out),
        "sha256": sha256(MANIFEST),
    }
