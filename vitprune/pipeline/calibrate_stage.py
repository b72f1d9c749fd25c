"""The calibrate stage: draw the calibration images from the train split."""

from collections.abc import Sequence
from typing import Any

from vitprune import data
from vitprune.config.params import Params
from vitprune.pipeline.project_data import CALIBRATION, METRICS, rows_of_classes, source_of
from vitprune.runtime import tables
from vitprune.runtime.files import sha256, write_json


def run(params: Params) -> None:
    """Write the calibration images and metrics/calibrate.json."""
    rows = draw_rows(params)
    tables.write_table(rows, tables.CALIBRATION, CALIBRATION)
    write_json(METRICS / "calibrate.json", calibration_facts(rows, params))


def draw_rows(params: Params) -> list[dict[str, Any]]:
    """Draw the calibration images of `prune.classes`, as `calibrate` and the seed say; rows of tables.CALIBRATION."""
    manifest, settings = rows_of_classes(params.prune.classes), params.calibrate
    return data.draw_calibration(manifest, source_of(params), settings.size, settings.balance, params.seed)


def calibration_facts(rows: Sequence[dict[str, Any]], params: Params) -> dict[str, Any]:
    """Return the content of metrics/calibrate.json, with the checksum of the written table."""
    return {"images": len(rows), "balance": params.calibrate.balance, "sha256": sha256(CALIBRATION)}
