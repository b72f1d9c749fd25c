"""The dataset stage: hash every image and write the manifest of the train and eval splits."""

from typing import Any

from vitprune import data
from vitprune.config.params import Params
from vitprune.pipeline.project_data import MANIFEST, METRICS, source_of
from vitprune.runtime import tables
from vitprune.runtime.files import sha256, write_json


def run(params: Params) -> None:
    """Write the manifest and metrics/dataset.json."""
    source = source_of(params)
    manifest = manifest_of(source, params)
    tables.write_table(manifest.rows, tables.MANIFEST, MANIFEST)
    write_json(METRICS / "dataset.json", dataset_facts(source, manifest, params))


def manifest_of(source: data.Source, params: Params) -> data.Manifest:
    """Read every image of a source and assign it to a split, as the `dataset` settings say."""
    settings = params.dataset
    return data.build_manifest(source, settings.eval_fraction, params.seed, settings.skip_limit)


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
        "sha256": sha256(MANIFEST),
    }
