"""Whether a new model may take the place of the one in use: a paired comparison on the same images, and gates."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import yaml
from pydantic import AfterValidator, Field, PlainValidator, ValidationError

from vitprune import data, models
from vitprune.config.params import Params
from vitprune.config.quantity import Quantity, number_of
from vitprune.config.targets import Section
from vitprune.errors import BadInput
from vitprune.evaluation.accuracy import accuracy
from vitprune.evaluation.paired_test import Paired, compare
from vitprune.pipeline import stage_context
from vitprune.runtime import tables
from vitprune.runtime.files import sha256, write_json

GATES, COMPARISON = Path("gates.yaml"), Path(".vitprune/comparison.json")
OUT, METRICS = Path("out"), Path("metrics")


def _positive(value: Quantity) -> Quantity:
    if number_of(value) <= 0:
        raise ValueError("give a number of bytes above 0, such as 25M")
    return value


class PromotionGates(Section):
    """What a new model must hold: gates.yaml, which no stage reads, so that a change of it computes nothing again.

    `max_accuracy_loss` is in points of top-1 against the champion, without one against the dense model; `alpha` the
    level of McNemar's exact test at which the new model counts as worse (null: no test); `min_speedup` that against
    the dense model, measured side by side; `max_size` the bytes of the weights (25M).
    """

    max_accuracy_loss: Annotated[float, Field(ge=0)] = 0.5
    alpha: Annotated[float, Field(gt=0, lt=1)] | None = 0.05
    min_speedup: Annotated[float, Field(gt=0)] | None = None
    max_size: Annotated[Quantity, PlainValidator(number_of), AfterValidator(_positive)] | None = None


@dataclass(frozen=True)
class QualityGate:
    """One gate: what was asked for, what was measured, whether it holds."""

    name: str
    asked: str
    measured: str
    holds: bool


def load_gates(path: Path) -> PromotionGates:
    """Read gates.yaml; without one, the defaults.

    Raises:
        BadInput: it is not YAML, or a key is unknown or of a wrong value.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        return PromotionGates.model_validate(raw)
    except FileNotFoundError:
        return PromotionGates()
    except yaml.YAMLError as error:
        raise BadInput(f"{path}: not valid YAML ({' '.join(str(error).split())}); correct it") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise BadInput(f"{path}: {key}: {first['msg']}, got {first['input']!r}; correct it") from None


def judge(params: Params, champion: Path | None, gates: PromotionGates) -> dict[str, Any]:
    """Compare the project's final model with a champion, image by image on the eval split, and apply the gates.

    `champion` is the directory of a saved model; None: against the dense model. Writes `COMPARISON`, returns it.

    Raises:
        BadInput: the champion is no model for these images, or the project has not been evaluated.
    """
    rows = tables.read(OUT / "evaluate/evaluation.parquet", tables.EVALUATION)
    if champion is not None:
        model = models.load(champion).to(stage_context.device())
        table = stage_context.open_images("eval", model, params)
        _, answers = accuracy(model, data.eval_batches(table, params.evaluate.batch_size))
        if list(table.ids) != rows["id"].to_pylist():
            raise BadInput("out/evaluate/evaluation.parquet: is of other images than the manifest; evaluate again")
        column = pa.array(answers.tolist(), pa.int64())
        rows = rows.set_column(rows.column_names.index("dense"), "dense", column)
    paired = compare(rows)
    weights = OUT / "distill" / models.WEIGHTS
    found = verdict(paired, gates, _speedup(), weights.stat().st_size, "dense" if champion is None else "champion")
    facts = {
        "against": "dense" if champion is None else "champion",
        "champion_sha256": None if champion is None else sha256(champion / models.WEIGHTS),
        "challenger_sha256": sha256(weights),
        "images": paired.images,
        "difference": paired.difference,
        "interval": list(paired.interval),
        "lost": paired.dense_only,
        "won": paired.pruned_only,
        "p_worse": paired.p_worse,
        "gates": [asdict(gate) for gate in found],
        "passed": all(gate.holds for gate in found),
    }
    write_json(COMPARISON, facts)
    return facts


def verdict(paired: Paired, gates: PromotionGates, speedup: float | None, size: int, against: str) -> list[QualityGate]:
    """Apply the gates to what was measured; one that is null is left out."""
    loss = max(0.0, -paired.difference)
    found = [
        QualityGate(
            "accuracy",
            f"at most {gates.max_accuracy_loss:g} points below the {against}",
            f"{paired.difference:+.2f} points",
            loss <= gates.max_accuracy_loss,
        )
    ]
    if gates.alpha is not None:
        asked = f"not worse than the {against} (McNemar's exact test, p >= {gates.alpha:g})"
        found.append(QualityGate("paired test", asked, f"p = {paired.p_worse:.3g}", paired.p_worse >= gates.alpha))
    if gates.min_speedup is not None:
        broadcast = "not measured" if speedup is None else f"{speedup:.2f}"
        holds = speedup is not None and speedup >= gates.min_speedup
        found.append(QualityGate("speed", f"at least {gates.min_speedup:g} times the dense model's", broadcast, holds))
    if gates.max_size is not None:
        most = number_of(gates.max_size)
        found.append(QualityGate("size", f"at most {most:,.0f} bytes", f"{size:,}", size <= most))
    return found


def _speedup() -> float | None:
    path = METRICS / "latency.json"
    if not path.is_file():
        return None
    facts = json.loads(path.read_text(encoding="utf-8"))
    return float(facts["dense"]["latency_ms"]["median"] / facts["pruned"]["latency_ms"]["median"])
