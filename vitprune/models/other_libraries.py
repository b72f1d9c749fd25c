"""Save and load models of transformers, torchvision and one's own classes: safetensors and config.json only."""

import copy
import inspect
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitprune.architectures import resize_to_structure, structure
from vitprune.architectures.classifier import keep_classes, output_count
from vitprune.architectures.inferred_widths import original_class
from vitprune.data.augment import example_input
from vitprune.errors import BadInput
from vitprune.models.build_limits import MAX_SECONDS, LimitedOperations, try_in_child
from vitprune.models.equality import same_logits
from vitprune.models.validation import (
    CONFIG,
    FORMAT,
    WEIGHTS,
    check_fit,
    check_format,
    check_size,
    check_value,
    checked_classes,
    checked_structure,
    header_of,
    read_header,
    read_object,
)
from vitprune.models.weights import load_in_type, write_weights
from vitprune.runtime.arguments import check_arguments
from vitprune.runtime.files import atomic_write, path_of_user
from vitprune.runtime.input_size import SIZE, input_size
from vitprune.runtime.kept_classes import CLASSES, kept_classes
from vitprune.runtime.messages import first_line

TRANSFORMERS, TORCHVISION, OWN = "transformers", "torchvision", "own"
MAX_CHANGED = 4  # entries of a configuration that record a uniform cut
CLASS = re.compile(r"[A-Za-z_]\w{0,100}", re.ASCII)
# entries of a configuration of transformers that have no effect on the forward pass, or that would load code or weights
DROPPED = (
    "_name_or_path", "architectures", "auto_map", "custom_pipelines", "dtype", "torch_dtype", "id2label", "label2id",
    "transformers_version", "quantization_config", "_attn_implementation", "attn_implementation", "problem_type",
)  # fmt: skip
REFUSED = ("backbone", "use_pretrained_backbone", "use_timm_backbone", "timm_kwargs")


@dataclass(frozen=True)
class Factory:
    """How to build the dense model of a saved one.

    Attributes:
        library: transformers, torchvision or own (a class of the user).
        name: Class of transformers or of the user, or name of a torchvision model.
        args: Configuration of transformers, or arguments of the torchvision model.
        classes: Class of the original model at every output, if some classes were kept.
    """

    library: str
    name: str
    args: Mapping[str, Any]
    classes: tuple[int, ...] | None = None


def save_other(
    model: nn.Module, directory: Path, factory: str | None = None, args: Mapping[str, Any] | None = None
) -> None:
    """Write a model that is not timm's: model.safetensors and config.json.

    A transformers model whose layers were cut alike is written so that `from_pretrained` loads it: the configuration
    has the new sizes. Otherwise config.json has the dense configuration and the structure.

    Args:
        model: The model.
        directory: An existing directory.
        factory: "torchvision:NAME" for a model of torchvision; None for transformers and for classes of one's own.
        args: Arguments of the torchvision model, such as num_classes.

    Raises:
        BadInput: the model built again from its config.json differs, or the factory is unknown.
    """
    made = _factory_of(model, factory, args or {})
    shapes, uniform = structure(model), None
    if made.library == TRANSFORMERS:
        uniform = next(_uniform_configs(model, made, shapes), None)
    if uniform is not None:
        made, shapes = uniform, {}
    config = {"format": FORMAT, "library": made.library, "name": made.name, "input_size": list(input_size(model))}
    config["structure"] = {name: list(shape) for name, shape in shapes.items()}
    own = made.args if made.library != TRANSFORMERS else {}
    config |= {"args": dict(own)} if own else {}
    config |= {} if (classes := kept_classes(model)) is None else {"classes": list(classes)}
    written = dict(made.args) | {"architectures": [made.name]} | _names(model) if made.library == TRANSFORMERS else {}
    if uniform is None and made.library != OWN:
        _refuse_other_model(model, made, shapes)
    with atomic_write(directory / CONFIG) as partial:
        partial.write_text(json.dumps(written | {"vitprune": config}, indent=2) + "\n")
        write_weights(model.state_dict(), directory / WEIGHTS)


def load_other(directory: Path) -> nn.Module:
    """Load a model of transformers or torchvision from a directory written by `save_other`; the files are not trusted.

    Raises:
        BadInput: a file is missing or invalid, or weights, arguments and structure do not match.
    """
    path = directory / CONFIG
    factory, shapes, size = _read(path)
    if factory.library == OWN:
        raise BadInput(
            f"{path}: a model of the class {factory.name}; call vitprune.load_into({factory.name}(...), ...)"
        )
    header = read_header(directory / WEIGHTS)
    try:
        try_in_child(lambda: _on_meta(factory, _constructed), MAX_SECONDS)
        check_size(path, _on_meta(factory), header)
        model = _build(factory)
    except BadInput:
        raise
    except Exception as error:  # constructors raise anything for untrusted arguments
        raise BadInput(f"{path}: {factory.library} cannot build {factory.name} ({first_line(error)})") from None
    setattr(model, SIZE, size)
    return _fill(model, factory, shapes, directory)


@check_arguments()
def load_into(model: nn.Module, directory: str | Path) -> nn.Module:
    """Remove units of a dense model of any class, in place, as in a saved model, and load the saved weights.

    Args:
        model: The dense model, built in the same way as the model that was pruned.
        directory: Directory written by `vitprune.save`.

    Returns:
        The model, in evaluation mode.

    Raises:
        BadInput: the structure or the weights do not fit the model.
    """
    directory = path_of_user(directory, "directory")
    factory, shapes, size = _read(directory / CONFIG)
    name = original_class(type(model)).__name__
    if name != factory.name and factory.library != TORCHVISION:
        raise BadInput(f"{directory / CONFIG}: was written for the class {factory.name}, the model is a {name}")
    setattr(model, SIZE, size)
    if factory.classes is not None and output_count(model) != len(factory.classes):
        keep_classes(model, factory.classes)
    return _fill(model, factory, shapes, directory)


def is_other(directory: Path) -> bool:
    """Return whether a directory has a model that is not timm's."""
    config = read_object(directory / CONFIG).get("vitprune")
    return isinstance(config, dict) and "library" in config


def _factory_of(model: nn.Module, factory: str | None, args: Mapping[str, Any]) -> Factory:
    kind = original_class(type(model))
    name, package = kind.__name__, kind.__module__.partition(".")[0]
    if factory is not None:
        library, _, model_name = factory.partition(":")
        if library != TORCHVISION or not model_name:
            raise BadInput(f"factory {factory!r}: unknown; write torchvision:NAME")
        classes = kept_classes(model)
        return Factory(TORCHVISION, model_name, {**({"num_classes": len(classes)} if classes else {}), **args})
    if package == TRANSFORMERS:
        import transformers

        if getattr(transformers, name, None) is kind:
            config: Any = model.config
            return Factory(TRANSFORMERS, name, _structural(config.to_dict()))
    return Factory(OWN, name, {})


def _structural(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a transformers configuration without names of sources, labels and types."""
    labels = config.get("id2label")
    result = {key: value for key, value in config.items() if key not in DROPPED and value is not None}
    return result | ({"num_labels": len(labels)} if labels is not None else {})


def _names(model: nn.Module) -> dict[str, Any]:
    """Return the class names as in a configuration of transformers; nothing if they are LABEL_0, LABEL_1, ..."""
    names = getattr(model.config, "id2label", None) or {}
    if all(name == f"LABEL_{label}" for label, name in names.items()):
        return {}
    return {
        "id2label": {str(label): str(name) for label, name in names.items()},
        "label2id": {str(name): int(label) for label, name in names.items()},
    }


def _build(factory: Factory) -> nn.Module:
    """Build the dense model; nothing is downloaded, and no code is loaded but that of the installed library."""
    with torch.random.fork_rng(devices=[]):
        return _constructed(factory)


def _constructed(factory: Factory) -> nn.Module:
    """Build as `_build`, but with the global generator, whose lock another thread may hold when a child is forked."""
    with LimitedOperations():
        if factory.library == TORCHVISION:
            import torchvision

            try:
                builder: Callable[..., nn.Module] = torchvision.models.get_model_builder(factory.name)
            except ValueError as error:
                raise BadInput(f"torchvision has no model {factory.name!r} ({first_line(error)})") from None
            return builder(**factory.args)
        kind = _transformers_class(factory.name)
        return kind(kind.config_class(**factory.args)).float()  # type: ignore[no-any-return]


def _on_meta(factory: Factory, build: Callable[[Factory], nn.Module] = _build) -> nn.Module:
    with torch.device("meta"):
        return build(factory)


def _transformers_class(name: str) -> Any:
    try:
        import transformers
    except ImportError:
        raise BadInput("transformers is not installed; pip install 'vitprune[models]'") from None
    kind: Any = getattr(transformers, name, None) if CLASS.fullmatch(name) else None
    if not (inspect.isclass(kind) and issubclass(kind, transformers.PreTrainedModel)):
        raise BadInput(f"transformers {transformers.__version__} has no model class {name[:80]!r}")
    return kind


def _read(path: Path) -> tuple[Factory, dict[str, tuple[int, ...]], tuple[int, ...]]:
    raw = read_object(path)
    saved = raw.get("vitprune")
    if not isinstance(saved, dict) or saved.get("library") not in (TRANSFORMERS, TORCHVISION, OWN):
        raise BadInput(
            f"{path}: not written by vitprune.save for a model that is not timm's; load timm's with vitprune.load"
        )
    check_format(path, saved.get("format"))
    name, size = saved.get("name"), saved.get("input_size")
    if not isinstance(name, str) or not CLASS.fullmatch(name):
        raise BadInput(f"{path}: vitprune.name is not the name of a model; download or save it again")
    if not (isinstance(size, list) and len(size) == 3 and all(type(n) is int and 0 < n <= 1 << 14 for n in size)):
        raise BadInput(f"{path}: vitprune.input_size must be channels, height and width; download or save it again")
    args = saved.get("args", {})
    if saved["library"] == TRANSFORMERS:
        args = _checked_config(path, {key: value for key, value in raw.items() if key != "vitprune"})
    elif not isinstance(args, dict):
        raise BadInput(f"{path}: vitprune.args must be a mapping; download or save it again")
    else:
        _check_args(path, args)
    factory = Factory(saved["library"], name, args, checked_classes(path, saved.get("classes")))
    return factory, checked_structure(path, saved.get("structure", {})), tuple(size)


def build_transformers(path: Path, name: str, config: Mapping[str, Any]) -> nn.Module:
    """Build a transformers model with random weights from an untrusted configuration.

    Args:
        path: Its file, for messages.
        name: Class of the model.
        config: The configuration.

    Raises:
        BadInput: an entry is refused, or there is no such class.
    """
    return _build(Factory(TRANSFORMERS, name, _checked_config(path, config)))


def load_like(dense: nn.Module, directory: Path) -> nn.Module:
    """Load a model that `save_other` wrote; one of a class of one's own into a copy of the dense model."""
    if _read(directory / CONFIG)[0].library == OWN:
        return load_into(copy.deepcopy(dense), directory)
    return load_other(directory)


def _checked_config(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    args = _structural(config)
    labels = config.get("num_labels", args.get("num_labels"))
    args |= {} if labels is None else {"num_labels": labels}
    _check_args(path, args)
    return args


def _check_args(path: Path, args: Mapping[str, Any]) -> None:
    for key, value in args.items():
        if key in REFUSED or key.startswith("weights"):
            if value:
                raise BadInput(f"{path}: {key[:80]}: names a source of weights or code; remove it")
        else:
            check_value(path, key[:80], value)


def _fill(model: nn.Module, factory: Factory, shapes: Mapping[str, tuple[int, ...]], directory: Path) -> nn.Module:
    """Cut a dense model to a structure and load the weights of a directory."""
    try:
        resize_to_structure(model, shapes)
    except BadInput as error:
        raise BadInput(f"{directory / CONFIG}: vitprune.structure: {error}") from None
    load_in_type(model, directory / WEIGHTS)
    if factory.classes is not None:
        setattr(model, CLASSES, factory.classes)
    return model.eval()


def _refuse_other_model(model: nn.Module, factory: Factory, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a model that is not the one built from its factory and structure."""
    name = type(model).__name__
    try:
        rebuilt = _build(factory)
        setattr(rebuilt, SIZE, input_size(model))
        resize_to_structure(rebuilt, shapes)
        check_fit(Path(name), header_of(model), rebuilt.state_dict(), name)
    except BadInput as error:
        why = str(error).removeprefix(f"{name}: ").partition(";")[0]
        where = "model.config, such as num_labels" if factory.library == TRANSFORMERS else "args"
        problem = f"{factory.library} does not build this model from its configuration ({why})"
        raise BadInput(f"{name}: {problem}; if you changed a layer, change {where} as well") from None
    except Exception as error:  # constructors raise anything for arguments that do not fit
        raise BadInput(f"{name}: {factory.library} cannot build {factory.name} ({first_line(error)})") from None
    rebuilt.load_state_dict(model.state_dict(), assign=True)
    kinds = [getattr(getattr(network, "config", None), "_attn_implementation", None) for network in (model, rebuilt)]
    if kinds[0] != kinds[1]:  # eager attention is the same function, and it is not saved
        rebuilt.set_attn_implementation(kinds[0])  # type: ignore[operator]
    if not same_logits(model, rebuilt, example_input(model, 2)):
        raise BadInput(
            f"{name}: its configuration does not describe it; another forward pass or activation is not saved"
        )


def _uniform_configs(model: nn.Module, factory: Factory, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Factory]:
    """Yield configurations of transformers whose model has the shapes and the logits of a cut model."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    dense = _on_meta(factory)
    if {name: tuple(tensor.shape) for name, tensor in dense.state_dict().items()} == expected:
        return
    changes = list(dict.fromkeys(_changes(factory.args, structure(dense), shapes)))
    for length in range(1, min(MAX_CHANGED, len(changes)) + 1):
        for chosen in itertools.combinations(changes, length):
            if len({key for key, _ in chosen}) < length:
                continue
            trial = Factory(factory.library, factory.name, {**factory.args, **dict(chosen)})
            try:
                shaped = {name: tuple(tensor.shape) for name, tensor in _on_meta(trial).state_dict().items()}
                if shaped == expected:
                    _refuse_other_model(model, trial, {})
                    yield trial
            except Exception:  # constructors raise anything for sizes that do not fit
                continue


def _changes(
    config: Mapping[str, Any], dense: Mapping[str, tuple[int, ...]], cut: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, Any]]:
    """Yield entries of a configuration with their values after a cut of all layers to the same sizes."""
    pairs = {
        (size, new) for name, shape in dense.items() for size, new in zip(shape, cut.get(name, shape), strict=False)
    }
    widths = {new for name, shape in dense.items() if len(shape) == 2 for new in cut.get(name, shape)[1:]}
    for key, value in config.items():
        for old, new in pairs:
            if type(value) is int and value == old != new:
                yield key, new
            if "ratio" in key and isinstance(value, int | float) and old != new:
                ratio = value * new / old
                yield key, int(ratio) if ratio.is_integer() else ratio
    for width in widths:
        yield "head_dim", width
