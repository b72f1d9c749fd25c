"""Whether a table for people needs top-5 accuracy: with five classes or fewer it is always 100 %."""

from collections.abc import Mapping
from typing import Any


def shows_top5(evaluation: Mapping[str, Any]) -> bool:
    """Return whether the top-5 accuracy of the dense or the pruned model is below 100 %.

    Args:
        evaluation: Content of metrics/evaluate.json.
    """
    accuracies = [evaluation.get(model, {}).get("top5") for model in ("dense", "pruned")]
    return any(value is not None and value < 100 for value in accuracies)
