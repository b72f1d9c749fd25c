"""Find groups of residual-stream channels in the channel dependency graph of a model."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from vitprune.architectures.inferred_widths import Classes, inferring_classes, restore_class, set_class
from vitprune.architectures.stream_widths import classes_after_errors, prove_classes, record_scales
from vitprune.architectures.tracing.cache import traced_attention, traced_channels, trial_run
from vitprune.architectures.tracing.dependency_graph import IS_OUTPUT, ChannelGroup
from vitprune.architectures.tracing.example_run import run_once, with_example
from vitprune.architectures.tracing.fingerprint import StructureCache
from vitprune.errors import BadInput
from vitprune.groups import Group, Resize, is_within
from vitprune.runtime.wrappers import layers_of_config

NARROW = "a narrower residual stream"
RESIDUAL = "residual"  # end of the name of a group of a stream
NO_NAMES: Mapping[str, str] = {}
_CLASSES: StructureCache[dict[tuple[str, ...], Classes | BadInput]] = StructureCache()
FIRST_WIDTH = ("embed_dim",)  # of a model whose stages have different widths
WIDTH_ATTRIBUTES = ("num_features", "head_hidden_size", "in_features", "embed_dim")  # of a timm model, or of its head


def groups(model: nn.Module, names: Mapping[str, str] = NO_NAMES) -> list[Group]:
    """Find the channels of every residual stream of a model, each with all layers that write and read it.

    Args:
        model: Any model.
        names: Names of groups by the path of a layer that writes their channels, both as for `re.sub`. If the model has
            such layers, its groups are those with these names, in this order, and they may reach the output of the
            model. Otherwise every stream is a group, named after the first layer that writes it.

    Raises:
        BadInput: a stream cannot be pruned, for the reason given, or there is none.

    Source: UP-ViTs, component 1.
    """
    named = _named_streams(model, names)
    streams = named or _all_streams(model)
    residual = {name: stream for name, stream in streams.items() if name.endswith(RESIDUAL)}
    features = _feature_entries(model, residual)
    stages = [name for name in named if name.endswith(RESIDUAL)]
    ends = {name: (name == stages[0], name == stages[-1]) for name in stages}
    return after_trial(
        model,
        [
            _group(model, name, stream, features.get(name, ()), *ends.get(name, (False, False)))
            for name, stream in streams.items()
        ],
    )


def _named_streams(model: nn.Module, names: Mapping[str, str]) -> dict[str, ChannelGroup]:
    channels, result = traced_channels(model), {}
    modules = dict(model.named_modules())
    for pattern, template in names.items():
        for match in filter(None, (re.fullmatch(pattern, path) for path in modules)):
            path, name = match.group(), match.expand(template)
            site = (f"{path}.weight", 1 if isinstance(modules[path], nn.Embedding) else 0)
            along = (group for group in channels if any((part.param, part.axis) == site for part in group.slices))
            stream = next(along, None)
            if stream is None:
                raise BadInput(
                    f"{name}: {site[0]} has no separate channels along axis {site[1]}, so they cannot be pruned"
                )
            _refuse_unprunable(stream, "" if stream.why_not.endswith(IS_OUTPUT) else stream.why_not)
            result[name] = stream
    return result


def _all_streams(model: nn.Module) -> dict[str, ChannelGroup]:
    streams = [group for group in traced_channels(model) if group.kind == "residual" and len(group.writers) > 1]
    streams = [stream for stream in streams if not _is_output(model, stream)]
    if not streams:
        raise BadInput(f"{type(model).__name__}: it has no residual stream between its layers")
    for stream in streams:
        _refuse_unprunable(stream, stream.why_not)
    return {f"{_first_writer(stream)}.{RESIDUAL}": stream for stream in streams}


def after_trial(model: nn.Module, groups: Sequence[Group]) -> list[Group]:
    """Return residual groups, with forward passes that infer the width of the stream where these are needed.

    A third of all channels is removed from a copy on the meta device first, because a forward pass may contain its
    widths as constants.

    Args:
        model: The model.
        groups: All its residual groups.

    Raises:
        BadInput: a copy with fewer channels does not run.
    """
    groups = [_with_classes(group, ()) for group in groups]
    try:
        trial_run(model, groups, NARROW)
    except BadInput as error:
        names = tuple(group.name for group in groups)
        known = _CLASSES.value_for(model, lambda model: {})
        if names not in known:
            known[names] = _proven_classes(model, groups) or error
        classes = known[names]
        if isinstance(classes, BadInput):
            raise BadInput(str(classes)) from None
        return [_with_classes(group, classes) for group in groups]
    return groups


def _proven_classes(model: nn.Module, groups: Sequence[Group]) -> Classes | BadInput:
    """Return the first proposal of classes with which a narrower model runs and computes the same; else the reason."""
    reason: Classes | BadInput = ()
    proposals: tuple[Callable[[nn.Module, Sequence[Group]], Classes], ...] = (_inferring, _after_errors)
    for number, propose in enumerate(proposals):
        try:
            if classes := propose(model, groups):
                trial_run(model, [_with_classes(one, classes) for one in groups], NARROW, f"proposal {number}")
                other = prove_classes(groups, classes, model)
                if not other:
                    return classes
                reason = BadInput(f"{other}; this model's residual streams cannot be cut")
        except BadInput as error:
            reason = error
    return reason


def _after_errors(model: nn.Module, groups: Sequence[Group]) -> Classes:
    return with_example(model, partial(classes_after_errors, groups))


def _inferring(model: nn.Module, groups: Sequence[Group]) -> Classes:
    heads = {1} | {one.heads for one in traced_attention(model).heads}
    sizes = {group.units // number for group in groups for number in heads if group.units % number == 0} - {1}
    return with_example(model, lambda copy, inputs: inferring_classes(copy, sizes, lambda: run_once(copy, inputs)))


def _with_classes(group: Group, classes: Classes) -> Group:
    above = len(group.owner) + 1 if group.owner else 0
    inside = tuple((path[above:], kind) for path, kind in classes if is_within(path, [group.owner or path]))
    return replace(group, resize=partial(_record, inside, group.resize))


def _record(classes: Classes, resize: Resize | None, owner: nn.Module, shape: tuple[int, ...]) -> None:
    """Record a new width, and give every module the matching forward pass."""
    if resize is not None:
        resize(owner, shape)
    for path, kind in classes:
        set_class(owner.get_submodule(path), kind)
    for module in owner.modules():
        restore_class(module)


def _refuse_unprunable(stream: ChannelGroup, why: str) -> None:
    if why or stream.units == 1:
        why = why or "its channels are all coupled with each other"
        raise BadInput(f"{_first_writer(stream)}: the residual stream that it writes cannot be cut ({why})")


def _is_output(model: Any, stream: ChannelGroup) -> bool:
    """Whether a sum is one of logits, as that of the two classifiers of a distilled model."""
    return stream.why_not.endswith(IS_OUTPUT) and stream.units == vars(model).get("num_classes")


def _first_writer(stream: ChannelGroup) -> str:
    return (*stream.writers, *(part.param for part in stream.slices))[0].rpartition(".")[0]


def _feature_entries(model: Any, streams: Mapping[str, ChannelGroup]) -> dict[str, list[int]]:
    """Return by stream the indices of the entries of timm's feature_info whose module has this stream as its output."""
    result: dict[str, list[int]] = {name: [] for name in streams}
    order = {path: index for index, (path, _) in enumerate(model.named_modules())}
    for number, feature in enumerate(getattr(model, "feature_info", ())):
        inside = [index for path, index in order.items() if is_within(path, [feature["module"]])]
        end = max(inside, default=len(order))
        earlier = [name for name, stream in streams.items() if order[_first_writer(stream)] <= end]
        same_width = [name for name in earlier if streams[name].units == feature["num_chs"]]
        if same_width:
            result[same_width[-1]].append(number)
    return result


def _group(
    model: Any, name: str, stream: ChannelGroup, features: Sequence[int], is_first: bool, is_last: bool
) -> Group:
    """Return the group of a stream; the model states the widths of its first and its last stream itself."""
    modules = dict(model.named_modules())
    classifiers = [path for path in layers_of_config(model, "classifier") if path in modules]
    read = {part.param.removesuffix(".weight"): part.length for part in stream.slices if part.axis == 1}
    heads = [path for path in classifiers if is_last or path in read]
    attributes: dict[str, Sequence[str]] = dict.fromkeys((path.rpartition(".")[0] for path in heads), WIDTH_ATTRIBUTES)
    if heads or is_last:
        attributes[""] = WIDTH_ATTRIBUTES
    elif is_first:
        attributes[""] = FIRST_WIDTH
    side_by_side = {1, *(read.get(path, 1) for path in heads)}  # pools of the stream that a classifier reads
    owner = "" if name.endswith(RESIDUAL) else name.rpartition(".")[0]  # channels inside one module
    resize = partial(_resize, {number * stream.units: number for number in side_by_side}, features, attributes)
    return Group(name, "residual", (stream.units,), stream.slices, "", owner, resize, buffers=stream.buffers)


def _resize(
    old: Mapping[int, int],
    features: Sequence[int],
    attributes: Mapping[str, Sequence[str]],
    model: Any,
    shape: tuple[int, ...],
) -> None:
    """Record a new width where timm's interfaces read it: in feature_info, and in the model and its classifier.

    `old` are old widths with the number of times that they contain the stream, `attributes` names by path of a module.
    """
    for number in features:
        model.feature_info[number]["num_chs"] = shape[0]
    for module, names in ((model.get_submodule(path), names) for path, names in attributes.items()):
        for name in names:
            width = getattr(module, name, None)
            if isinstance(width, int) and width in old:
                setattr(module, name, old[width] * shape[0])
    record_scales(model)
