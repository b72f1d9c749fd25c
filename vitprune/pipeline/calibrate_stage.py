"""The calibrate stage: draw the calibration images from the train split."""

from vitprune import data
from vitprune.config.params import Params
from vitprune.pipeline.project_data import CALIBRATION, METRICS, rows_of_classes, source_of
from vitprune.runtime import tables
from vitprune.runtime.files import sha256, write_json


def run(params: Params) -> None:
    """Write the calibration images, those of `prune.classes`, and metrics/calibrate.json."""
    manifest, settings = rows_of_classes(params.prune.classes), params.calibrate
    rows = data.draw_calibration(manifest, source_of(params), settings.size, settings.balance, params.seed)
    tables.write_table(rows, tables.CALIBRATION, CALIBRATION)
    facts = {"images": len(rows), "balance": settings.balance, "sha256": sha256(CALIBRATION)}
    write_json(METRICS / "calibrate.json", facts)
