"""The dataset stage: hash every image and write the manifest of the train and eval splits."""

from collections.abc import Sequence

from vitprune import data
from vitprune.config.params import Params
from vitprune.errors import BadInput
from vitprune.pipeline.project_data import MANIFEST, METRICS, source_of
from vitprune.runtime import tables
from vitprune.runtime.files import sha256, write_json


def run(params: Params) -> None:
    """Read every image of the source and assign it to a split; write the manifest and metrics/dataset.json."""
    source = source_of(params)
    if source.left_out:
        print(f"{source.spec}: {len(source.left_out)} files or folders are left out: {_few(source.left_out)}")
    settings = params.dataset
    manifest = data.build_manifest(
        source, settings.eval_fraction, params.seed, settings.skip_limit, settings.exif_orientation
    )
    if manifest.skipped:
        print(f"{source.spec}: {len(manifest.skipped)} images cannot be read: {_few(manifest.skipped)}")
    tables.write_table(manifest.rows, tables.MANIFEST, MANIFEST)
    splits = [row["split"] for row in manifest.rows]
    facts = {
        "source": settings.source,
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
    write_json(METRICS / "dataset.json", facts)


def _few(names: Sequence[str]) -> str:
    """Return the first names, shortened and printable."""
    return str(BadInput(", ".join(names[:8]) + (", ..." if len(names) > 8 else "")))
