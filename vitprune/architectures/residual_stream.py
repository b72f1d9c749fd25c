"""Residual streams of any model, found by running its shapes once: one group per stream."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.models.metaformer import Scale
from torch import nn

from vitprune.architectures import narrow_attention
from vitprune.architectures.tracing.cache import traced_channels, trial_run
from vitprune.architectures.tracing.dependency_graph import ChannelGroup
from vitprune.errors import BadInput
from vitprune.groups import Group, is_within

WIDTHS = ("num_features", "head_hidden_size", "in_features", "embed_dim")  # of a model, or of its head


def groups(model: nn.Module) -> list[Group]:
    """The channels of every residual stream: what is added up, through all the layers that write and read it.

    A cut of a third is tried on the model's shapes first, since a forward pass may know its widths by heart.

    Raises:
        BadInput: a stream cannot be cut, for the reason given, or there is none.

    Source: UP-ViTs, component 1.
    """
    streams = [one for one in traced_channels(model) if one.kind == "residual" and len(one.writers) > 1]
    streams = [one for one in streams if not _is_answer(model, one)]
    if not streams:
        raise BadInput(f"{type(model).__name__}: it has no residual stream between its layers")
    for one in streams:
        if one.why_not or one.units == 1:
            why = one.why_not or "its channels stand and fall together"
            raise BadInput(f"{_path(one)}: the residual stream that it writes cannot be cut ({why})")
    features = _features(model, streams)
    found = [_group(model, one, features[place]) for place, one in enumerate(streams)]
    trial_run(model, found, "a narrower residual stream")
    return found


def _is_answer(model: Any, one: ChannelGroup) -> bool:
    """Whether a sum is of classifiers, as of a distilled model's two."""
    return one.why_not.endswith("it is the answer") and one.units == model.num_classes


def _path(one: ChannelGroup) -> str:
    return one.writers[0].rpartition(".")[0]


def _features(model: Any, streams: Sequence[ChannelGroup]) -> list[list[int]]:
    """Which entries of timm's feature_info tell each stream's width: those of modules at whose end it runs."""
    found: list[list[int]] = [[] for _ in streams]
    order = {path: place for place, (path, _) in enumerate(model.named_modules())}
    for number, feature in enumerate(getattr(model, "feature_info", ())):
        places = [place for path, place in order.items() if is_within(path, [feature["module"]])]
        end = max(places, default=len(order))
        begun = [place for place, one in enumerate(streams) if order[_path(one)] <= end]
        alike = [place for place in begun if streams[place].units == feature["num_chs"]]
        if alike:
            found[alike[-1]].append(number)
    return found


def _group(model: Any, one: ChannelGroup, features: Sequence[int]) -> Group:
    names = model.pretrained_cfg.get("classifier") or ()
    names = (names,) if isinstance(names, str) else tuple(names)
    read = [name for name in names if any((p.param, p.axis) == (f"{name}.weight", 1) for p in one.slices)]
    heads = tuple(dict.fromkeys(name.rpartition(".")[0] for name in read))
    resize = partial(_resize, one.units, features, heads)
    return Group(f"{_path(one)}.residual", "residual", (one.units,), one.slices, resize=resize, buffers=one.buffers)


def _resize(old: int, features: Sequence[int], heads: Sequence[str], model: Any, shape: tuple[int, ...]) -> None:
    """Record a new width where timm's own interfaces read it, and give attentions the forward that fits it."""
    for number in features:
        model.feature_info[number]["num_chs"] = shape[0]
    for module in (model, *(model.get_submodule(path) for path in heads)) if heads else ():
        for name in WIDTHS:
            if getattr(module, name, None) == old:
                setattr(module, name, shape[0])
    for module in model.modules():
        if type(module) in narrow_attention.NARROW or type(module) in narrow_attention.TIMM_CLASS:
            narrow_attention.set_forward_class(module, module.num_heads, module.proj.in_features // module.num_heads)
        elif isinstance(module, Scale):
            module.shape = (len(module.scale), *module.shape[1:])
