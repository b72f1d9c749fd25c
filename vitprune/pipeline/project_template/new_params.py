"""Create params.yaml for a new project: the demo's file, adapted to data, model and method."""

import re
from collections.abc import Mapping
from typing import Any

import timm
import yaml

from vitprune.errors import BadInput
from vitprune.pruning.methods import method_named
from vitprune.pruning.select import sparsity_of

DEFAULT_MODEL = "deit_tiny_patch16_224"
# Initial values for photographs, to be tuned in params.yaml.
TRAIN = {"epochs": 100, "batch_size": 256, "lr": 0.0005, "weight_decay": 0.05, "warmup_epochs": 5, "smoothing": 0.1}
RECOVER = {"epochs": 3, "batch_size": 128, "lr": 0.0001, "weight_decay": 0.05, "augment": "light"}
DISTILL = {"epochs": 30, "batch_size": 128, "lr": 0.0001, "weight_decay": 0.05, "warmup_epochs": 1, "augment": "deit"}
SPARSITY = {"ffn": 0.5, "residual": 0.1} | dict.fromkeys(("attention", "qk", "vo", "head", "block", "branch"), 0.25)


def render(demo: str, source: str, model: str | None, method: str, classes: int | None) -> str:
    """Change the text of the demo's params.yaml for a source, a timm model, a method and a number of classes.

    Raises:
        BadInput: timm does not know the model, the method is unknown, or the classes do not fit.
    """
    if source == "digits":
        changes = _for_digits(model, classes)
    else:
        changes = _for_photographs(source, model or DEFAULT_MODEL, classes)
    for key, value in (changes | _for_method(method, source == "digits")).items():
        demo = _changed(demo, key, value)
    return demo


def _for_digits(model: str | None, classes: int | None) -> dict[str, Any]:
    if classes not in (None, 10):
        raise BadInput(f"--classes {classes}: digits has 10 classes; leave the option out")
    if model is None:
        return {}
    _published_classes(model)
    config = timm.get_pretrained_cfg(model)
    free = config is not None and not config.fixed_input_size  # timm's model then has no argument img_size
    size: dict[str, Any] = {"pretrained_cfg_overlay": {"input_size": [1, 32, 32]}} if free else {"img_size": 32}
    return {"model.name": model, "model.args": size | {"in_chans": 1, "num_classes": 10}}


def _for_photographs(source: str, model: str, classes: int | None) -> dict[str, Any]:
    """Use published weights, fine-tuned if the classes differ; random weights if there are none."""
    published = _published_classes(model)
    fits = published is not None and classes in (None, published)
    if published is None and classes is None:
        raise BadInput(f"--classes: timm has no weights of {model}, so the number of classes must be given")
    return {
        "dataset.source": source,
        "model.name": model,
        "model.args": {} if fits else {"num_classes": classes},
        "dense.start": "train" if published is None else "pretrained",
        "dense.train": None if fits else TRAIN | {"augment": "deit"},
        "prune.finetune": RECOVER,
        "distill.train": DISTILL,
        "evaluate.batch_size": 64,
    }


def _published_classes(model: str) -> int | None:
    """Return the number of classes of timm's weights for a model, None where it has none."""
    if not timm.is_model(model):
        near = timm.list_models(f"{model.split('_')[0]}*")[:3]
        hint = f"; similar names: {', '.join(near)}" if near else "; timm.list_models() returns all names"
        raise BadInput(f"--model {model!r}: timm has no model of this name{hint}")
    if not timm.is_model_pretrained(model):
        return None
    return int(timm.get_pretrained_cfg(model).num_classes)


def _for_method(method: str, digits: bool) -> dict[str, Any]:
    row = method_named(method)
    if {row.scopes[kind] for kind in row.kinds} == {"macs"}:  # all kinds share one budget
        return {"prune.method": method, "prune.sparsity": 0.4}
    if "weight" not in row.kinds:
        if digits and row.kinds == ("ffn", "attention"):  # the demo's sparsities are for these kinds and its model
            return {"prune.method": method}
        return {"prune.method": method, "prune.sparsity": {kind: SPARSITY[kind] for kind in row.kinds}}
    if sparsity_of(row.scopes["weight"]) is not None:  # N:M determines the sparsity and needs one cycle
        return {"prune.method": method, "prune.sparsity": None, "prune.cycles": 1}
    return {"prune.method": method, "prune.sparsity": 0.5}


def _changed(text: str, key: str, value: Mapping[str, Any] | str | float | None) -> str:
    """Replace the value of `section.name`, and keep the comment after it."""
    section, _, name = key.partition(".")
    line = re.compile(rf"(^{section}:\n(?:[ ]+.*\n)*?)([ ]+{name}:.*?)(?:([ ]+)(#.*))?$", re.MULTILINE)
    written = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000)
    new = f"  {name}: " + written.removesuffix("\n").removesuffix("\n...")

    def replaced(match: re.Match[str]) -> str:
        before, old, gap, comment = match.groups()
        return before + (f"{new.ljust(len(old + gap) - 2)}  {comment}" if comment else new)

    changed, count = line.subn(replaced, text, count=1)
    if count != 1:
        raise ValueError(f"the demo's params.yaml has no line for {key}")
    return changed
