"""Pruning methods: importance criterion, ranking scope per kind of units, and weight update."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from vitprune.config.prune_config import HEAD_CHANNELS
from vitprune.config.section import similar
from vitprune.criteria import Criterion, RecomputeUpdate, UpdateFromStats, corp, magnitude, taylor
from vitprune.criteria.kl import exact, fisher, leave_one_out
from vitprune.criteria.kl.gate_gradients import find_gates
from vitprune.criteria.moments import find_consumer, find_projections
from vitprune.criteria.obs import cap, fastcap, obc, units
from vitprune.errors import BadInput
from vitprune.groups import Group
from vitprune.pruning import rescoring

ADDITIVE = (taylor.taylor, leave_one_out.leave_one_out_kl, exact.exact_kl, fisher.fisher_kl)


@dataclass(frozen=True)
class Method:
    """A pruning method.

    Attributes:
        criterion: Importance criterion.
        scopes: Kinds of units that it can prune, each with the scope in which its units are ranked.
        kinds: Kinds that are pruned by default.
        free_scope: Whether the user may choose another scope.
        about: Description in one line.
        update_from_stats: Computes the update of the remaining weights from the statistics of the criterion.
        rescore: Computes more precise scores of the units near the pruning threshold.
        recompute_update: Computes the update from the images, if its statistics are too large to be stored.
        collective: Whether the criterion distributes its work over processes itself.
        check_group: Raises BadInput if the criterion or the update, which record inputs and outputs of layers, cannot
            take a group of units.
    """

    criterion: Criterion
    scopes: Mapping[str, str]
    kinds: tuple[str, ...]
    free_scope: bool
    about: str
    update_from_stats: UpdateFromStats | None = None
    rescore: rescoring.RescoreFn | None = None
    recompute_update: RecomputeUpdate | None = None
    collective: bool = False
    check_group: Callable[[nn.Module, Group], object] | None = None

    @property
    def additive(self) -> bool:
        """Whether the scores are sums over batches, which processes can compute in parts."""
        return self.criterion in ADDITIVE

    @property
    def records_layers(self) -> bool:
        """Whether inputs and outputs of single layers are recorded, so that these must be called as modules."""
        recording = self.check_group is not None or self.update_from_stats is not None
        return recording or self.collective or self.criterion is cap.fisher_diagonal

    @property
    def needs_runs_in_memory(self) -> bool:
        """Whether the weights of every run of an N:M pattern must be neighbors in memory."""
        return self.collective or self.criterion is obc.obc

    @property
    def follows_merging(self) -> bool:
        """Whether the scores are those of a model that merges tokens; exact KL scores are not."""
        return self.criterion is not exact.exact_kl and self.rescore is None


def _single(
    criterion: Criterion, scope: str, about: str, free_scope: bool = False, update: UpdateFromStats | None = None
) -> Method:
    return Method(criterion, {"weight": scope}, ("weight",), free_scope, about, update)


def _blockwise(criterion: Criterion, recompute_update: RecomputeUpdate, about: str) -> Method:
    return Method(
        criterion, {"weight": "global"}, ("weight",), True, about, recompute_update=recompute_update, collective=True
    )


def _structured(
    criterion: Criterion, about: str, free_scope: bool = False, rescore: rescoring.RescoreFn | None = None
) -> Method:
    scopes = {"ffn": "layer", "attention": "head", "head": "layer", "residual": "layer"}
    if criterion in (magnitude.magnitude, taylor.taylor):
        scopes |= {"qk": "head", "vo": "head"}
    check = _check_gates if criterion is fisher.fisher_kl else None
    return Method(criterion, scopes, ("ffn", "attention"), free_scope, about, rescore=rescore, check_group=check)


def _check_gates(model: nn.Module, group: Group) -> None:
    find_gates(model, [group])


def _check_gates_and_reader(model: nn.Module, group: Group) -> None:
    _check_gates(model, group)
    find_consumer(model, group)


def _check_reader_and_basis(model: nn.Module, group: Group) -> None:
    if group.kind not in ("residual", "qk"):
        find_consumer(model, group)
    if group.kind in HEAD_CHANNELS:
        find_projections(group)


METHODS: dict[str, Method] = {
    "random": _single(magnitude.random, "global", "random weights: the baseline", free_scope=True),
    "magnitude": _single(magnitude.magnitude, "global", "smallest weights of the whole model"),
    "uniform": _single(magnitude.magnitude, "layer", "smallest weights of each layer"),
    "lamp": _single(magnitude.energy, "global", "layer-adaptive magnitude (Lee et al., ICLR 2021)"),
    "dimap": _single(magnitude.energy, "module", "data-free, module-aware: qkv, proj, mlp (He & Zhou, ICLR 2024)"),
    "taylor": _single(taylor.taylor, "global", "first-order change of the loss (Molchanov et al., CVPR 2019)"),
    "n:m": _single(magnitude.magnitude, "2:4", "magnitude; N of every M consecutive weights remain", free_scope=True),
    "ovit": _blockwise(
        cap.ovit,
        cap.joint_update,
        "greedy second-order elimination in Fisher blocks, with weight update (CAP, NeurIPS 2023); also N:M",
    ),
    "ovit-increments": _blockwise(
        cap.ovit_increments,
        cap.joint_update,
        "the same elimination, weights ranked by the increase of their block's loss (ours)",
    ),
    "woodfisher": _blockwise(
        cap.woodfisher,
        cap.independent_update,
        "loss increase of each weight alone, with the sum of the single updates (WoodFisher, NeurIPS 2020)",
    ),
    "woodfisher-joint": _blockwise(
        cap.with_joint_update(cap.woodfisher), cap.joint_update, "masks of woodfisher, weight update of ovit"
    ),
    "fisher-diagonal": _single(
        cap.fisher_diagonal,
        "global",
        "squared weight times the diagonal of the Fisher matrix (ovit with blocks of one weight)",
        free_scope=True,
    ),
    "fastcap": _single(
        fastcap.fastcap,
        "layer",
        "one Fisher matrix per layer, columns pruned from left to right (FastCAP: CAP, algorithm 2)",
        free_scope=True,
        update=fastcap.columnwise_update,
    ),
    "obc": _single(
        obc.obc,
        "global",
        "OBS per output row on the input Hessian, remaining weights solved again (OBC, NeurIPS 2022); also N:M",
        free_scope=True,
        update=obc.obc_update,
    ),
    "magnitude-obs": _blockwise(
        cap.with_joint_update(magnitude.magnitude), cap.joint_update, "smallest weights, weight update of ovit"
    ),
    "channel-magnitude": _structured(
        magnitude.magnitude, "smallest L2 norm of a unit's rows (Li et al., ICLR 2017)", free_scope=True
    ),
    "channel-taylor": _structured(taylor.taylor, "first-order change of the loss, per unit", free_scope=True),
    "upvits": _structured(
        fisher.fisher_kl,
        "KL divergence: second-order scores, exact ones near the pruning threshold (UP-ViTs, SCIS 2023)",
        rescore=rescoring.rescore,
    ),
    "upvits-literal": _structured(
        leave_one_out.leave_one_out_kl, "exact KL divergence, one removal at a time (slow reference)"
    ),
    "upvits-exact": _structured(exact.exact_kl, "exact KL divergence, from cached activations"),
    "upvits-fisher": _structured(
        fisher.fisher_kl, "KL divergence to second order, from a few backward passes for all units"
    ),
    "upvits-blocks": Method(
        exact.exact_kl,
        {"block": "layer", "branch": "layer"},
        ("block",),
        False,
        "KL divergence of whole blocks (UP-ViTs) or of single branches (DC-ViT), scored again after each removal",
    ),
    "upvits-refit": Method(
        units.with_refit_update(fisher.fisher_kl),
        {"ffn": "layer", "attention": "head", "head": "layer"},
        ("ffn", "attention"),
        True,
        "upvits-fisher, then least-squares refit of the following layers to the dense outputs (ours)",
        units.refit_update,
        check_group=_check_gates_and_reader,
    ),
    "upvits-global": Method(
        units.with_refit_update(fisher.fisher_kl),
        {"ffn": "macs", "attention": "macs", "head": "macs"},
        ("ffn", "attention"),
        False,
        "KL divergence per MAC saved, ranked over all layers and kinds, with refit (ours)",
        units.refit_update,
        check_group=_check_gates_and_reader,
    ),
    "unit-obs": Method(
        units.unit_obs,
        {"ffn": "macs", **dict.fromkeys(HEAD_CHANNELS, "macs"), "head": "macs", "residual": "layer"},
        ("ffn", "attention"),
        True,
        "structured OBS: greedy elimination in nats per MAC, rotated attention basis, with refit (ours)",
        units.unit_obs_update,
        check_group=_check_reader_and_basis,
    ),
    "corp": Method(
        corp.corp,
        {"ffn": "layer"},
        ("ffn",),
        True,
        "FFN units of least energy and weight, predicted from the remaining ones (CORP, 2026)",
        corp.affine_update,
        check_group=find_consumer,
    ),
}
"""Pruning methods by name; `vitprune methods` prints what each needs."""

CRITERIA: dict[str, Criterion] = {
    "random": magnitude.random,
    "magnitude": magnitude.magnitude,
    "energy": magnitude.energy,
    "taylor": taylor.taylor,
    "kl-literal": leave_one_out.leave_one_out_kl,
    "kl-exact": exact.exact_kl,
    "kl-fisher": fisher.fisher_kl,
    "unit-obs": units.unit_obs,
    "corp": corp.corp,
    "ovit": cap.ovit,
    "ovit-increments": cap.ovit_increments,
    "woodfisher": cap.woodfisher,
    "fisher-diagonal": cap.fisher_diagonal,
    "fastcap": fastcap.fastcap,
    "obc": obc.obc,
}
"""Importance criteria by name, for `score`: functions of (model, groups, batches, context) -> Importance."""


def records_layers(criterion: Criterion) -> bool:
    """Return whether a criterion is that of a method which records inputs and outputs of single layers."""
    return any(method.criterion is criterion and method.records_layers for method in METHODS.values())


def method_named(name: str, key: str = "method") -> Method:
    """Return the method of a name.

    Args:
        name: One of METHODS.
        key: Name of the argument, or of the key in params.yaml, for the error message.

    Raises:
        BadInput: there is no such method.
    """
    if not isinstance(name, str):
        raise BadInput(f"{key}: is a {type(name).__name__}; give one of {', '.join(METHODS)}")
    if name not in METHODS:
        raise BadInput(f"{key} {name!r}: unknown{similar(name, list(METHODS))}; use one of {', '.join(METHODS)}")
    return METHODS[name]
