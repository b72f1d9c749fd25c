"""Groups of a model by its parts: every module of a known class, whatever model it is in."""

import re
from collections.abc import Callable, Iterator
from typing import Any

from timm.layers import AttentionPoolLatent
from torch import nn

from vitprune.architectures import attention, mlp
from vitprune.architectures.parts import refuse
from vitprune.architectures.tracing.cache import traced_channels, trial_run
from vitprune.errors import BadInput
from vitprune.groups import Group, is_within

KINDS = ("ffn", "head", "attention")
WORDS = {"ffn": "MLP", "head": "attention", "attention": "attention"}
MLPS = re.compile(r"mlp|ffn|feedforward|glu|bottleneck|mbconv|inverted|basicblock", re.IGNORECASE)
NOT_MLPS = re.compile(r"head|norm", re.IGNORECASE)
ATTENTIONS = re.compile(r"attn|attention|mhsa|msa|mla|xca|gpsa|rel(ative)?pos", re.IGNORECASE)


def groups(model: nn.Module, kind: str) -> list[Group]:
    """All groups of one kind, in the order of the model's modules; attention that pools for the classifier stays whole.

    Raises:
        BadInput: a module of the kind cannot lose it or is not understood; it is named. Or the model has none.
    """
    known = _known_mlp if kind == "ffn" else attention.known
    whole = [path for path, module in model.named_modules() if isinstance(module, AttentionPoolLatent)]
    found: list[Group] = []
    traced: dict[str, list[Group]] = {}
    for path, module in model.named_modules():
        if is_within(path, whole):
            continue
        if known(module):
            found += mlp.groups(path, module) if kind == "ffn" else attention.groups(kind, path, module)
        elif path and _looks_like(kind, module) and not _covered(model, path, module, known):
            traced[path] = _traced(model, path) if kind == "ffn" else []
            if not traced[path]:
                raise refuse(path, module, f"this {WORDS[kind]} is not understood yet")
            found += traced[path]
    if traced:
        own = [group for groups_of in traced.values() for group in groups_of]
        trial_run(model, own, f"fewer hidden units in {', '.join(traced)}")
    if not found:
        raise BadInput(f"{type(model).__name__}: there is no {WORDS[kind]} in it, so it has no groups of kind {kind!r}")
    return found


def _traced(model: nn.Module, path: str) -> list[Group]:
    """Hidden units of an MLP that nobody named: what is written and read in it alone, as a trace of shapes finds."""
    found = []
    for one in traced_channels(model):
        own = all(is_within(part.param, [path]) for part in one.slices)
        read = any(part.axis == 1 for part in one.slices)
        if one.kind == "ffn" and one.units > 1 and not one.why_not and one.writers and own and read:
            name = f"{one.writers[0].rpartition('.')[0]}.units"
            found.append(Group(name, "ffn", (one.units,), one.slices, buffers=one.buffers))
    return found


def _known_mlp(module: nn.Module) -> bool:
    return type(module) in mlp.ORDERS


def _looks_like(kind: str, module: nn.Module) -> bool:
    """Whether a module is of the kind by its class's name or by what it is made of."""
    name = type(module).__name__
    if not any(True for _ in module.parameters()):
        return False
    if kind == "ffn":
        made = {leaf for leaf, _ in module.named_children()} >= {"fc1", "fc2"}
        return not NOT_MLPS.search(name) and bool(MLPS.search(name) or (made and not re.search(r"SE|Squeeze", name)))
    return bool(ATTENTIONS.search(name)) or "num_heads" in vars(module)


def _covered(model: nn.Module, path: str, module: nn.Module, known: Callable[[nn.Module], bool]) -> bool:
    """Whether a module is a part of a known one, or made of some."""
    return any(known(inner) for inner in module.modules()) or any(known(outer) for outer in _above(model, path))


def _above(model: Any, path: str) -> Iterator[nn.Module]:
    names = path.split(".")
    for length in range(1, len(names)):
        yield model.get_submodule(".".join(names[:length]))
