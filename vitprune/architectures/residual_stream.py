"""Find groups of residual-stream channels in the channel dependency graph of a model."""

from collections.abc import Callable, Sequence
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

NARROW = "a narrower residual stream"
_CLASSES: StructureCache[dict[tuple[str, ...], Classes | BadInput]] = StructureCache()
WIDTH_ATTRIBUTES = ("num_features", "head_hidden_size", "in_features", "embed_dim")  # of a timm model, or of its head


def groups(model: nn.Module) -> list[Group]:
    """Find the channels of every residual stream of a timm model, each with all layers that write and read it.

    Raises:
        BadInput: a stream cannot be pruned, for the reason given, or there is none.

    Source: UP-ViTs, component 1.
    """
    streams = [group for group in traced_channels(model) if group.kind == "residual" and len(group.writers) > 1]
    streams = [stream for stream in streams if not _is_output(model, stream)]
    if not streams:
        raise BadInput(f"{type(model).__name__}: it has no residual stream between its layers")
    for stream in streams:
        _refuse_unprunable(stream, stream.why_not)
    features = _feature_entries(model, streams)
    return after_trial(model, [_group(model, stream, features[index]) for index, stream in enumerate(streams)])


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


def group_along(
    channels: Sequence[ChannelGroup], name: str, param: str, axis: int, resize: Resize | None = None, owner: str = ""
) -> Group:
    """Build the residual group of the channels along one axis of a parameter, for models with sizes of their own.

    Args:
        channels: The coupled channels of the model, from `traced_channels`; they may reach the output of the model.
        name: Name of the group.
        param: A parameter of the residual stream, such as the weight of the patch embedding.
        axis: Its axis of channels.
        resize: Function that records a new width in the module `owner`; None if nothing does.
        owner: Path of the module that `resize` changes; empty for the model.

    Raises:
        BadInput: the channels cannot be pruned, for the reason given.
    """
    for stream in channels:
        if any((part.param, part.axis) == (param, axis) for part in stream.slices):
            _refuse_unprunable(stream, "" if stream.why_not.endswith(IS_OUTPUT) else stream.why_not)
            return Group(name, "residual", (stream.units,), stream.slices, "", owner, resize, buffers=stream.buffers)
    raise BadInput(f"{name}: {param} has no separate channels along axis {axis}, so they cannot be pruned")


def _refuse_unprunable(stream: ChannelGroup, why: str) -> None:
    if why or stream.units == 1:
        why = why or "its channels are all coupled with each other"
        raise BadInput(f"{_first_writer(stream)}: the residual stream that it writes cannot be cut ({why})")


def _is_output(model: Any, stream: ChannelGroup) -> bool:
    """Whether a sum is one of logits, as that of the two classifiers of a distilled model."""
    return stream.why_not.endswith(IS_OUTPUT) and stream.units == vars(model).get("num_classes")


def _first_writer(stream: ChannelGroup) -> str:
    return (*stream.writers, *(part.param for part in stream.slices))[0].rpartition(".")[0]


def _feature_entries(model: Any, streams: Sequence[ChannelGroup]) -> list[list[int]]:
    """Indices into timm's feature_info that hold the width of each stream: it passes the end of the entry's module."""
    result: list[list[int]] = [[] for _ in streams]
    order = {path: index for index, (path, _) in enumerate(model.named_modules())}
    for number, feature in enumerate(getattr(model, "feature_info", ())):
        inside = [index for path, index in order.items() if is_within(path, [feature["module"]])]
        end = max(inside, default=len(order))
        earlier = [index for index, stream in enumerate(streams) if order[_first_writer(stream)] <= end]
        same_width = [index for index in earlier if streams[index].units == feature["num_chs"]]
        if same_width:
            result[same_width[-1]].append(number)
    return result


def _group(model: Any, stream: ChannelGroup, features: Sequence[int]) -> Group:
    names = vars(model).get("pretrained_cfg", {}).get("classifier") or ()
    names = (names,) if isinstance(names, str) else tuple(names)
    read = [name for name in names if any((p.param, p.axis) == (f"{name}.weight", 1) for p in stream.slices)]
    heads = tuple(dict.fromkeys(name.rpartition(".")[0] for name in read))
    resize = partial(_resize, stream.units, features, heads)
    name, shape = f"{_first_writer(stream)}.residual", (stream.units,)
    return Group(name, "residual", shape, stream.slices, resize=resize, buffers=stream.buffers)


def _resize(old: int, features: Sequence[int], heads: Sequence[str], model: Any, shape: tuple[int, ...]) -> None:
    """Record a new width where timm's interfaces read it."""
    for number in features:
        model.feature_info[number]["num_chs"] = shape[0]
    for module in (model, *(model.get_submodule(path) for path in heads)) if heads else ():
        for name in WIDTH_ATTRIBUTES:
            if getattr(module, name, None) == old:
                setattr(module, name, shape[0])
    record_scales(model)
