"""Arguments of other types: every public function refuses them in one line that names the argument, or takes them."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vitprune
from tests.support.model_zoo import batches, tiny
from vitprune import BadInput, DistillConfig, PruneConfig, ScoreConfig, TrainConfig

RECIPE = TrainConfig(epochs=1, lr=0.001)
FUNCTIONS = [name for name in vitprune.__all__ if inspect.isfunction(getattr(vitprune, name))]
OTHERS: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "a string": lambda: "other",
    "an integer": lambda: 3,
    "a fraction": lambda: 0.5,
    "an empty list": list,
    "a list": lambda: [object()],
    "a mapping": lambda: {"other": 1},
    "an object": object,
    "a tensor": lambda: torch.zeros(2),
}


def arguments(name: str, folder: Path) -> dict[str, Any]:
    """Return valid arguments of a public function, one for each of its parameters."""
    model = tiny("vit")
    images, data = batches(model, 1, 2)[0][0], batches(model, 2, 2)
    groups = vitprune.find_groups(model, ["ffn"])
    scores = {group.name: torch.arange(group.units, dtype=torch.float32) for group in groups}
    masks = vitprune.select(scores, 0.5)
    single = {
        group.name: torch.ones(group.shape, dtype=torch.bool) for group in vitprune.find_groups(model, ["weight"])
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scored = {"config": ScoreConfig(), "seed": 0}
    onnx = folder / "model.onnx"
    settings = {"sparsity": {"ffn": 0.5}, "kinds": ["ffn"], "scope": "layer", "round_to": 8, "cycles": 1}
    settings |= {"target": None, "rules": [], "merge_heads_to": None, "rotate_residual": False, "merge_tokens": None}
    settings |= {"classes": None, "correct_norms": False, "allocation": False, "budget": None, "within": "blocks"}
    settings |= {"reconstruct": False, "example_input": images, "calibration": data}
    values: Mapping[str, Mapping[str, Any]] = {
        "accuracy": {"batches": data},
        "check": {"name": "vit_tiny_patch16_224", "kinds": ["ffn"], "ratios": [0.5], "args": {"depth": 1}},
        "count": {"example_input": images},
        "evaluate": {"batches": data, "metric": "cosine", "dense": model, "reference": data, "threshold": 0.0},
        "export_onnx": {"path": onnx, "opset": None, "dynamic_size": False, "external_data": False},
        "export_pt2": {"path": folder / "model.pt2", "dynamic_size": False},
        "find_groups": {"kinds": ["ffn"], "example_input": images},
        "finetune": {"loader": data, "config": RECIPE, "teacher": model, "keep_zeros": True, "segment": None}
        | {"distillation": DistillConfig(), "seed": 0},
        "freeze_zeros": {"optimizers": optimizer, "averages": [model], "masks": single},
        "gradual_prune": {"config": PruneConfig(method="magnitude", sparsity=0.5, finetune=RECIPE), "loader": data}
        | {"calibration": data, "score": ScoreConfig(), "teacher": model, "seed": 0},
        "latency": {"models": [model], "example_input": images, "runs": 1},
        "load": {"directory": folder},
        "load_into": {"directory": folder},
        "merge_heads": {"groups": vitprune.find_groups(model, ["attention"]), "number": 1},
        "merge_tokens": {"number": 1},
        "onnx_to_fp16": {"source": onnx, "path": folder / "fp16.onnx", "dynamic_size": False},
        "onnx_to_openvino": {"source": onnx, "path": folder / "model.xml", "dynamic_size": False},
        "permute": {"groups": groups, "orders": {group.name: torch.arange(group.units) for group in groups}},
        "plan_for": {"config": PruneConfig(method="magnitude", sparsity=0.5), "score": ScoreConfig(), "seed": 0},
        "prune": {"method": "channel-magnitude", **settings, **scored},
        "save": {"directory": folder, "factory": None, "args": None},
        "score": {"groups": groups, "criterion": "magnitude", "batches": data, **scored},
        "select": {"scores": scores, "sparsity": 0.5, "scope": "global", "groups": groups, "previous": masks}
        | {"keep_at_least": 1, "bounds": {}},
        "shrink": {"groups": groups, "masks": masks},
        "write_card": {"directory": folder, "project": None},
        "zero": {"groups": groups, "masks": masks},
    }
    given = dict(values[name])
    names = inspect.signature(getattr(vitprune, name)).parameters
    given |= {"model": model} if "model" in names else {}
    given |= {"example_input": images} if "example_input" in names else {}
    assert set(given) == set(names), name
    return given


def call(name: str, given: Mapping[str, Any]) -> None:
    """Call a public function; what it yields is read, and its context is entered."""
    options = dict(given)
    optimizers = [options.pop("optimizers")] if "optimizers" in options else []
    model = [options.pop("model")] if optimizers else []
    result = getattr(vitprune, name)(*model, *optimizers, **options)
    if isinstance(result, Iterator):
        next(result, None)
    elif isinstance(result, contextlib.AbstractContextManager):
        with result:
            pass


def refusals(name: str, folder: Path) -> Iterator[tuple[str, str, Exception | None]]:
    """Yield for every argument and every other value the error of the function, None if it takes the value."""
    for argument in inspect.signature(getattr(vitprune, name)).parameters:
        for kind, other in OTHERS.items():
            try:
                call(name, arguments(name, folder) | {argument: other()})
            except Exception as error:
                yield argument, kind, error
            else:
                yield argument, kind, None


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_of_other_types_are_taken_or_refused_in_one_line(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # a file may be called "other"
    results = list(refusals(name, tmp_path / "model"))
    raw = [
        f"{argument}, {kind}: {error!r}" for argument, kind, error in results if not isinstance(error, BadInput | None)
    ]
    assert raw == []
    assert all("\n" not in str(error) for _, _, error in results)
    refused = {argument for argument, kind, error in results if error is not None and kind == "an object"}
    assert refused >= set(inspect.signature(getattr(vitprune, name)).parameters) - {"scope"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda vit: vitprune.shrink(vit, None, None), "groups: is a NoneType; give a list of groups of find_groups"),
        (lambda vit: vitprune.zero(vit, [], None), "masks: is a NoneType; give a mapping of names to tensors"),
        (lambda vit: vitprune.zero(vit, [], {"a": 1}), "masks: has a int at 'a'; give a mapping of names to tensors"),
        (lambda vit: vitprune.permute(vit, ["a"], {}), "groups: has a str at 0; give a list of groups of find_groups"),
        (
            lambda vit: vitprune.count(None, 3),
            "model: is a NoneType; give a model of timm.create_model or vitprune.load",
        ),
        (lambda vit: vitprune.latency([vit], torch.ones(1), "3"), "runs: is a str; give an integer"),
        (lambda vit: vitprune.select({}, None), "sparsity: is a NoneType; give a number"),
        (
            lambda vit: vitprune.evaluate(vit, [], 3),
            "metric: is a int; give one of 'accuracy', 'knn', 'cosine', 'cka', 'iou'",
        ),
        (lambda vit: vitprune.save(vit, 3), "directory: is a int; give a path"),
        (
            lambda vit: vitprune.score(vit, [], "taylor", 3),
            "batches: is a int; give a list or a DataLoader of pairs (images, labels)",
        ),
        (
            lambda vit: vitprune.finetune(vit, [], RECIPE, keep_zeros="x"),
            "keep_zeros: is a str; give True or False or a FrozenZeros",
        ),
    ],
)
def test_the_message_says_what_to_give(call: Callable[[nn.Module], object], message: str) -> None:
    with pytest.raises(BadInput) as error:
        call(tiny("vit"))
    assert str(error.value) == message


def test_a_missing_argument_is_named_by_python() -> None:
    with pytest.raises(TypeError, match=r"^zero\(\) missing 2 required positional arguments: 'groups' and 'masks'"):
        vitprune.zero(tiny("vit"))
