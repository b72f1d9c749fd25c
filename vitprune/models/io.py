"""Create, load and save models: safetensors and config.json only."""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models._hub import save_config_for_hf
from torch import nn

from vitprune.architectures import Cut, apply_cuts, resize_to_structure, structure, uniform_args
from vitprune.architectures.token_merging import merged_tokens
from vitprune.config.section import similar
from vitprune.data.augment import data_config, example_input
from vitprune.errors import BadInput
from vitprune.models.build_limits import MAX_SECONDS, LimitedOperations, try_in_child
from vitprune.models.equality import first_difference, same_logits
from vitprune.models.other_libraries import is_other, load_other, save_other
from vitprune.models.validation import (
    CONFIG,
    FORMAT,
    WEIGHTS,
    ModelConfig,
    TensorSpec,
    check_fit,
    check_size,
    header_of,
    read_config,
    read_header,
)
from vitprune.models.weights import load_in_type, load_weights, write_weights
from vitprune.runtime.arguments import check_arguments
from vitprune.runtime.files import atomic_write, make_directory, path_of_user
from vitprune.runtime.kept_classes import CLASSES, kept_classes
from vitprune.runtime.messages import first_line, without_retry_lines
from vitprune.runtime.model_checks import checked_model
from vitprune.runtime.wrappers import is_timm_model

OFFLINE = "; without a network, give a file of weights: dense.start checkpoint and dense.checkpoint in params.yaml"


def create(
    name: str,
    args: Mapping[str, Any] | None = None,
    seed: int = 0,
    pretrained: bool = False,
    checkpoint: Path | None = None,
    key: str = "model.name",
) -> nn.Module:
    """Create a timm model with seeded random, pretrained or checkpoint weights.

    Args:
        name: Model name of timm.
        args: Arguments of timm.create_model.
        seed: Seed of random weights.
        pretrained: Load timm's published weights.
        checkpoint: A safetensors file to load.
        key: What messages call the name: the key of params.yaml or an argument.

    Returns:
        The model.

    Raises:
        BadInput: timm does not know the name or an argument, or the weights do not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            with without_retry_lines():
                model: nn.Module = timm.create_model(name, pretrained=pretrained, **(args or {}))
        except (RuntimeError, TypeError, ValueError, AssertionError, OSError) as error:
            hint = "" if timm.is_model(name.partition(".")[0]) else similar(name, timm.list_models())
            hint = OFFLINE if isinstance(error, OSError) and pretrained and not hint else hint
            raise BadInput(f"{key} {name!r}: timm cannot create it ({first_line(error)}){hint}") from None
    _match_channels(model)
    if checkpoint is not None:
        load_weights(model, checkpoint)
    return model


def _match_channels(model: Any) -> None:
    """Average mean and std of the config if the model has another number of input channels."""
    for key in ("mean", "std"):
        values = model.pretrained_cfg.get(key)
        if values and len(values) != model.in_chans:
            model.pretrained_cfg[key] = (sum(values) / len(values),) * model.in_chans


@check_arguments()
def save(
    model: nn.Module, directory: str | Path, factory: str | None = None, args: Mapping[str, Any] | None = None
) -> None:
    """Write model.safetensors and config.json in the format of timm or transformers, with the shapes of a pruned model.

    If all blocks have the same shape, plain timm loads it too: timm.create_model("local-dir:DIRECTORY"). Before a file
    is written, the model is built again from its config.json and compared. A transformers model whose layers all have
    the same shapes is also loaded by from_pretrained. A model of your own class is loaded by `load_into`.

    Args:
        model: A model made by timm.create_model or `load`, also inside torch.compile or data parallelism, or one of
            another library or of one's own.
        directory: Directory to write.
        factory: "torchvision:NAME" for a model of torchvision.
        args: Arguments of the torchvision model, such as num_classes.

    Raises:
        BadInput: the model's weights are not finite or of several types, or config.json cannot record a change of the
            model, such as another activation.

    Example:
        vitprune.save(result.model, "pruned", factory="torchvision:vit_b_16")
    """
    directory, model = path_of_user(directory, "directory"), checked_model(model)
    if not is_timm_model(model):
        make_directory(directory)
        save_other(model, directory, factory, args)
        return
    if "architecture" not in getattr(model, "pretrained_cfg", {}) or isinstance(model, nn.ModuleDict):  # features_only
        raise BadInput(f"{type(model).__name__}: only models made by timm.create_model (or vitprune.load) can be saved")
    make_directory(directory)
    with atomic_write(directory / CONFIG) as partial:
        save_config_for_hf(model, str(partial), model_args=uniform_args(model))
        config = json.loads(partial.read_text())
        # timm writes the value of the published input size
        config["pretrained_cfg"]["crop_pct"] = data_config(model)["crop_pct"]
        shapes = {name: list(shape) for name, shape in structure(model).items()}
        config["vitprune"] = {"format": FORMAT, "structure": shapes}
        classes = kept_classes(model)
        config["vitprune"] |= {} if classes is None else {"classes": list(classes)}
        partial.write_text(json.dumps(config, indent=2) + "\n")
        _refuse_other_model(model, read_config(partial))
        write_weights(model.state_dict(), directory / WEIGHTS)


def _refuse_other_model(model: nn.Module, config: ModelConfig) -> None:
    """Refuse a model whose weights, structure or logits are not those of the one built from its config."""
    name, header = type(model).__name__, header_of(model)
    try:
        with torch.device("meta"):
            meta = _build_dense(config, header)
        cuts = _resize(meta, config)
        check_fit(Path(name), header, meta.state_dict(), name)
    except BadInput as error:
        why = str(error).removeprefix(f"{config.path}: ").removeprefix(f"{name}: ").partition(";")[0]
        remedy = "change the classifier by reset_classifier, other layers by arguments of timm.create_model"
        raise BadInput(f"{name}: timm does not build this model from its config ({why}); {remedy}") from None
    difference = first_difference(model, meta)
    if difference:
        rebuilt = _build_dense(config, header)
        apply_cuts(rebuilt, cuts)
        rebuilt.load_state_dict(model.state_dict(), assign=True)  # in the types of the model
        if not same_logits(model, rebuilt, example_input(model, 2)):
            raise BadInput(f"{difference}; config.json does not record it, so give it to timm.create_model")


@check_arguments()
def load(directory: str | Path) -> nn.Module:
    """Load a model from a directory that `save` or timm wrote.

    The files are not trusted: no code from them is run, and everything is checked on the meta device before memory is
    allocated.

    Args:
        directory: Directory with model.safetensors and config.json.

    Returns:
        The model, in evaluation mode.

    Raises:
        BadInput: a file is missing or invalid, exceeds a limit, or weights, arguments and structure do not match.
    """
    directory = path_of_user(directory, "directory")
    if is_other(directory):
        return load_other(directory)
    config, path = read_config(directory / CONFIG), directory / WEIGHTS
    header = read_header(path)
    with torch.device("meta"):
        meta = _build_dense(config, header)
    cuts = _resize(meta, config)
    check_fit(path, header, meta.state_dict(), type(meta).__name__)
    model = _build_dense(config, header)
    apply_cuts(model, cuts)
    load_in_type(model, path)
    if config.classes is not None:
        setattr(model, CLASSES, config.classes)
    return model.eval()


@dataclass(frozen=True)
class SavedModel:
    """Description of a saved model.

    Attributes:
        architecture: Model name of timm.
        pretrained_cfg: timm's config of the model.
        params: Number of parameters.
        plain: Whether plain timm loads it: all blocks have the same shape, and no tokens are merged.
        merged: Largest number of tokens that are merged before a block.
    """

    architecture: str
    pretrained_cfg: Mapping[str, Any]
    params: int
    plain: bool
    merged: int


def describe_saved(directory: Path) -> SavedModel:
    """Describe a saved model without reading its weights.

    Raises:
        BadInput: as `load`.
    """
    config, path = read_config(directory / CONFIG), directory / WEIGHTS
    header = read_header(path)
    with torch.device("meta"):
        meta = _build_dense(config, header)
    plain = not config.structure or structure(meta) == config.structure
    _resize(meta, config)
    check_fit(path, header, meta.state_dict(), type(meta).__name__)
    params = sum(parameter.numel() for parameter in meta.parameters())
    merged = max((number for (number,) in merged_tokens(meta).values()), default=0)
    return SavedModel(config.architecture, config.pretrained_cfg, params, plain, merged)


def _build_dense(config: ModelConfig, header: Mapping[str, TensorSpec]) -> nn.Module:
    """Create the dense model of a config, unless it is much larger than its weights file."""
    args = json.dumps({"pretrained_cfg": dict(config.pretrained_cfg), **config.args})
    try:
        if torch.get_default_device().type == "meta":
            _try_build(config.architecture, args)
        with torch.random.fork_rng(devices=[]):  # not in the child, where another thread may hold the generator's lock
            model = _created(config.architecture, args)
    except Exception as error:  # timm raises various errors for untrusted arguments
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise BadInput(
            f"{config.path}: timm cannot create {config.architecture} with these model_args ({reason})"
        ) from None
    check_size(config.path, model, header)
    return model


def _created(architecture: str, args: str) -> nn.Module:
    with LimitedOperations():
        model: nn.Module = timm.create_model(architecture, pretrained=False, **json.loads(args))
        _match_channels(model)
    return model


@functools.lru_cache(1024)
def _try_build(architecture: str, args: str) -> None:
    """Build a model in a child process, once for the same arguments."""
    try_in_child(lambda: _created(architecture, args), MAX_SECONDS)


def _resize(model: nn.Module, config: ModelConfig) -> list[Cut]:
    try:
        return resize_to_structure(model, config.structure)
    except BadInput as error:
        raise BadInput(f"{config.path}: vitprune.structure: {error}") from None
