"""Model card of a saved model: README.md with Hugging Face hub metadata, from recorded values only."""

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
import timm
import yaml

from vitprune.errors import BadInput
from vitprune.models.io import SavedModel, describe_saved
from vitprune.models.validation import WEIGHTS
from vitprune.runtime.arguments import check_arguments
from vitprune.runtime.files import read_json, sha256, write_text
from vitprune.runtime.top5 import shows_top5

CARD = "README.md"
INITIAL_WEIGHTS = {
    "pretrained": "timm's published weights",
    "checkpoint": "a checkpoint",
    "train": "random weights, trained",
}
TYPES: dict[str, dict[str, type]] = {  # of the values that a card shows, by file and key; those in a dict are numbers
    "dense": {"from": str, "checkpoint_sha256": str, "sha256": str},
    "score": {"method": str},
    "prune": {"cycles": int},
    "evaluate": {"images": int, "dense": dict, "pruned": dict},
    "cycle": {"sparsity": dict, "masks_sha256": str},
}
NUMBERS = {  # key of metrics/evaluate.json -> label and format
    "top1": ("Top-1 accuracy, %", "{:.2f}"),
    "top5": ("Top-5 accuracy, %", "{:.2f}"),
    "params": ("Parameters", "{:,}"),
    "nonzero_params": ("Nonzero parameters", "{:,}"),
    "macs": ("Multiply-accumulates per image", "{:,}"),
    "nonzero_macs": ("Multiply-accumulates with a nonzero weight", "{:,}"),
}
PAGE = """\
---
{{ header }}---

# {{ saved.architecture }}, pruned

A timm model of {{ "{:,}".format(saved.params) }} parameters, pruned with vitprune.
{% if saved.merged %}
Before every block but the first, up to {{ saved.merged }} patch tokens are merged into similar ones. The model
classifies images; it has no features per patch.
{% endif %}{% if method %}
## What was removed

Method `{{ method }}`{% if cycles %}, in {{ cycles }} cycle{{ "s" if cycles > 1 }}{% endif %}:

| kind | removed |
|---|---|
{% for kind, share in sparsity.items() -%}
| {{ kind }} | {{ "{:.1f}".format(100 * share) }} % |
{% endfor %}{% if masks %}
sha256 of the masks: `{{ masks }}`
{% endif %}{% endif %}{% if rows %}
## Measured

{% if images %}Accuracy on {{ "{:,}".format(images) }} evaluation images.

{% endif %}| | dense | pruned |
|---|---|---|
{% for name, dense, pruned in rows -%}
| {{ name }} | {{ dense }} | {{ pruned }} |
{% endfor %}{% endif %}
## Loading
{% if saved.plain %}
```python
import timm

model = timm.create_model("local-dir:DIRECTORY", pretrained=True)  # from the hub: "hf-hub:USER/NAME"
```
{% else %}
timm alone cannot build this structure; vitprune reads it from config.json:

```python
import vitprune

model = vitprune.load("DIRECTORY")  # a timm model; no code from the directory is run
```
{% endif %}
## Provenance

{% for name, value in provenance.items() -%}
- {{ name }}: {{ value }}
{% endfor -%}
"""


@check_arguments()
def write_card(directory: str | Path, project: str | Path | None = None) -> None:
    """Write a model card, README.md, into the directory of a saved model.

    Unknown values are left out: results and masks without a project, base model and license unless the model started
    from timm's published weights.

    Args:
        directory: Directory of the saved model.
        project: Directory of the pipeline project that made the model; its metrics are read.

    Raises:
        BadInput: the directory holds no saved model, or a metrics file is invalid.
    """
    directory = Path(directory)
    saved = describe_saved(directory)
    facts = _facts(Path(project), saved) if project is not None else {}
    method = facts.get("method")
    tags = ["timm", "image-classification", "pruning", "vitprune"] + ([method] if method else [])
    header = {"library_name": "timm", "pipeline_tag": "image-classification"} | facts.get("base", {}) | {"tags": tags}
    versions = {package: metadata.version(package) for package in ("vitprune", "timm", "torch")}
    provenance = {f"sha256 of {WEIGHTS}": f"`{sha256(directory / WEIGHTS)}`"} | facts.get("provenance", {}) | versions
    environment = jinja2.Environment(undefined=jinja2.Undefined, keep_trailing_newline=True)
    page = environment.from_string(PAGE).render(
        facts | {"header": yaml.safe_dump(header, sort_keys=False), "saved": saved, "provenance": provenance}
    )
    write_text(directory / CARD, page)


def _facts(project: Path, saved: SavedModel) -> dict[str, Any]:
    """Read the metrics of a project."""
    dense, score, prune, evaluation = (
        _read_metrics(project / f"metrics/{name}.json", name) for name in ("dense", "score", "prune", "evaluate")
    )
    cycles = prune.get("cycles")
    last = {} if cycles is None else _read_metrics(project / f"out/cycles/{cycles:02d}/metrics.json", "cycle")
    return {
        "base": _base(saved) if dense.get("from") == "pretrained" else {},
        "method": score.get("method") if last else None,
        "cycles": cycles,
        "sparsity": last.get("sparsity", {}),
        "masks": last.get("masks_sha256"),
        "images": evaluation.get("images"),
        "rows": _rows(evaluation),
        "provenance": _origin(dense),
    }


def _base(saved: SavedModel) -> dict[str, str]:
    """Return base model and license from timm's registry."""
    name, tag = saved.architecture, saved.pretrained_cfg.get("tag")
    config = timm.get_pretrained_cfg(f"{name}.{tag}" if tag else name, allow_unregistered=True)
    if config is None:
        return {}
    values = {"license": config.license, "base_model": config.hf_hub_id}
    return {key: value for key, value in values.items() if value}


def _rows(evaluation: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return the numbers of both models; those of nonzero weights only if they differ."""
    dense, pruned = evaluation.get("dense", {}), evaluation.get("pruned", {})
    rows = []
    for key, (name, form) in NUMBERS.items():
        plain = key.removeprefix("nonzero_")
        is_new = key == plain or pruned.get(key) != pruned.get(plain) or dense.get(key) != dense.get(plain)
        if key in dense and key in pruned and is_new and (key != "top5" or shows_top5(evaluation)):
            rows.append((name, form.format(dense[key]), form.format(pruned[key])))
    return rows


def _origin(dense: Mapping[str, Any]) -> dict[str, str]:
    """Return the origin of the dense model."""
    origin = {}
    if dense.get("from") in INITIAL_WEIGHTS:
        origin["the dense model started from"] = INITIAL_WEIGHTS[dense["from"]]
    if dense.get("checkpoint_sha256"):
        origin["sha256 of that checkpoint"] = f"`{dense['checkpoint_sha256']}`"
    if dense.get("sha256"):
        origin["sha256 of the dense weights"] = f"`{dense['sha256']}`"
    return origin


def _read_metrics(path: Path, file: str) -> dict[str, Any]:
    """Return the values of TYPES that a metrics file has; none if there is no such file."""
    content = read_json(path) if path.is_file() else {}
    given = {key: content[key] for key in TYPES[file] if content.get(key) is not None}
    for key, value in given.items():
        inner = value if isinstance(value, dict) else {}
        wrong = [f"{key}.{name}" for name, number in inner.items() if not isinstance(number, int | float)]
        wrong += [] if isinstance(value, TYPES[file][key]) else [key]
        if wrong:
            raise BadInput(f"{path}: the value of {wrong[0]} has another type; run the stage that writes it again")
    return given
