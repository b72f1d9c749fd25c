"""Promotion gates: compare a new model with the champion on the same images (paired test), its speed and its size."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
from pydantic import AfterValidator, Field, PlainValidator

from vitprune import data, models
from vitprune.architectures.classifier import of_same_classes
from vitprune.config.params import Params, checked, read_yaml
from vitprune.config.quantity import Quantity, number_of
from vitprune.config.section import Section
from vitprune.errors import BadInput
from vitprune.evaluation.accuracy import accuracy
from vitprune.evaluation.paired_test import McNemarTable, mcnemar_table
from vitprune.pipeline.evaluate_stage import EVALUATION
from vitprune.pipeline.project_data import METRICS, OUT, device, open_images
from vitprune.runtime import tables
from vitprune.runtime.files import read_optional_json, sha256, write_json

GATES, COMPARISON = Path("gates.yaml"), Path(".vitprune/comparison.json")


def _positive(value: Quantity) -> Quantity:
    if number_of(value) <= 0:
        raise ValueError("give a number of bytes above 0, such as 25M")
    return value


class PromotionGates(Section):
    """Conditions that a new model must meet: gates.yaml. No stage depends on it.

    Attributes:
        max_accuracy_loss: Largest loss of top-1 against the champion, or against the dense model if there is none, in
            percentage points.
        alpha: Significance level of McNemar's exact test that the new model is worse; null: no test.
        min_speedup: Least speed-up against the dense model, measured side by side; null: no gate.
        max_size: Largest size of the weights in bytes (25M); null: no gate.
    """

    max_accuracy_loss: Annotated[float, Field(ge=0)] = 0.5
    alpha: Annotated[float, Field(gt=0, lt=1)] | None = 0.05
    min_speedup: Annotated[float, Field(gt=0)] | None = None
    max_size: Annotated[Quantity, PlainValidator(number_of), AfterValidator(_positive)] | None = None


@dataclass(frozen=True)
class QualityGate:
    """The result of one gate.

    Attributes:
        name: Name of the gate.
        asked: The requirement.
        measured: The measured value.
        holds: Whether the requirement is met.
    """

    name: str
    asked: str
    measured: str
    holds: bool


def load_gates(path: Path) -> PromotionGates:
    """Read gates.yaml; return the defaults if there is no such file.

    Raises:
        BadInput: the file is not YAML, or a key is unknown or has an invalid value.
    """
    if not path.exists() or not path.read_bytes().strip():
        return PromotionGates()
    return checked(read_yaml(path, "give the gates"), PromotionGates, path)


def compare_with_champion(params: Params, champion: Path | None, gates: PromotionGates) -> dict[str, Any]:
    """Compare the project's final model with the champion on the eval split and apply the gates.

    Args:
        params: The project's params.yaml.
        champion: Directory of the champion; None compares with the dense model.
        gates: The gates.

    Returns:
        The content of the written file `COMPARISON`.

    Raises:
        BadInput: the champion does not fit the images, or the project has not been evaluated.
    """
    rows = tables.read_table(EVALUATION, tables.EVALUATION)
    if champion is not None:
        model = of_same_classes(models.load(champion), models.load(OUT / "distill")).to(device())
        table = open_images("eval", model, params)
        _, predicted = accuracy(model, data.eval_batches(table, params.evaluate.batch_size))
        if list(table.ids) != rows["id"].to_pylist():
            raise BadInput(f"{EVALUATION}: has other images than the manifest; run vitprune evaluate again")
        column = pa.array(predicted.tolist(), pa.int64())
        rows = rows.set_column(rows.column_names.index("dense"), "dense", column)
    paired = mcnemar_table(rows)
    weights = OUT / "distill" / models.WEIGHTS
    against = "dense" if champion is None else "champion"
    results = verdict(paired, gates, _speedup(), weights.stat().st_size, against)
    facts = {
        "against": against,
        "champion_sha256": None if champion is None else sha256(champion / models.WEIGHTS),
        "challenger_sha256": sha256(weights),
        "images": paired.images,
        "difference": paired.difference,
        "interval": list(paired.interval),
        "lost": paired.dense_only,
        "won": paired.pruned_only,
        "p_worse": paired.p_worse,
        "gates": [asdict(gate) for gate in results],
        "passed": all(gate.holds for gate in results),
    }
    write_json(COMPARISON, facts)
    return facts


def verdict(
    paired: McNemarTable, gates: PromotionGates, speedup: float | None, size: int, against: str
) -> list[QualityGate]:
    """Apply the gates that are not null.

    Args:
        paired: The comparison on the same images.
        gates: The gates.
        speedup: Speed-up against the dense model; None if not measured, which fails its gate.
        size: Size of the weights in bytes.
        against: Name of the other model, "champion" or "dense".
    """
    loss = max(0.0, -paired.difference)
    asked = f"at most {gates.max_accuracy_loss:g} points below the {against}"
    results = [QualityGate("accuracy", asked, f"{paired.difference:+.2f} points", loss <= gates.max_accuracy_loss)]
    if gates.alpha is not None:
        asked = f"not worse than the {against} (McNemar's exact test, p >= {gates.alpha:g})"
        results.append(QualityGate("paired test", asked, f"p = {paired.p_worse:.3g}", paired.p_worse >= gates.alpha))
    if gates.min_speedup is not None:
        measured = "not measured" if speedup is None else f"{speedup:.2f}"
        holds = speedup is not None and speedup >= gates.min_speedup
        results.append(QualityGate("speed", f"at least {gates.min_speedup:g} times the dense model's", measured, holds))
    if gates.max_size is not None:
        most = number_of(gates.max_size)
        results.append(QualityGate("size", f"at most {most:,.0f} bytes", f"{size:,}", size <= most))
    return results


def _speedup() -> float | None:
    facts = read_optional_json(METRICS / "latency.json")
    if facts is None:
        return None
    return float(facts["dense"]["latency_ms"]["median"] / facts["pruned"]["latency_ms"]["median"])
