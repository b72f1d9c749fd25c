"""The table of methods: what may go, what it is worth, who competes. Two methods differ only as their rows do."""

from collections.abc import Mapping
from dataclasses import dataclass

from vitprune.criteria import Criterion, RecomputeUpdate, UpdateFromStats, corp, magnitude, taylor
from vitprune.criteria.kl import exact, fisher, leave_one_out
from vitprune.criteria.obs import cap, fastcap, obc, units
from vitprune.errors import BadInput
from vitprune.pruning import rescoring

ADDITIVE = (taylor.taylor, leave_one_out.leave_one_out_kl, exact.exact_kl, fisher.fisher_kl)


@dataclass(frozen=True)
class Method:
    """A row: criterion x scope per kind. A single sparsity applies to `kinds`, the others must be asked for."""

    criterion: Criterion
    scopes: Mapping[str, str]
    kinds: tuple[str, ...]
    free_scope: bool
    about: str
    update: UpdateFromStats | None = None  # the criterion's update, from the statistics that it has left
    settle: rescoring.RescoreFn | None = None  # measures again where the criterion's scores leave in doubt who stays
    again: RecomputeUpdate | None = None  # the same update from the images, where what it needs is too large to be left
    collective: bool = False  # its criterion shares its work among processes by itself

    @property
    def additive(self) -> bool:
        """Whether scores are sums over batches, so that processes can share them."""
        return self.criterion in ADDITIVE


def _single(criterion: Criterion, scope: str, about: str, free_scope: bool = False) -> Method:
    return Method(criterion, {"weight": scope}, ("weight",), free_scope, about)


def _blockwise(criterion: Criterion, again: RecomputeUpdate, about: str) -> Method:
    return Method(criterion, {"weight": "global"}, ("weight",), True, about, again=again, collective=True)


def _structured(criterion: Criterion, about: str) -> Method:
    scopes = {"ffn": "layer", "attention": "head", "head": "layer", "residual": "layer"}
    return Method(criterion, scopes, ("ffn", "attention"), True, about)


def _upvits(criterion: Criterion, about: str, settle: rescoring.RescoreFn | None = None) -> Method:
    scopes = {"ffn": "layer", "attention": "head", "head": "layer", "residual": "layer"}
    return Method(criterion, scopes, ("ffn", "attention"), False, about, settle=settle)


METHODS: dict[str, Method] = {
    "random": _single(magnitude.random, "global", "weights drawn at random: the floor", free_scope=True),
    "magnitude": _single(magnitude.magnitude, "global", "smallest weights of the whole model"),
    "uniform": _single(magnitude.magnitude, "layer", "smallest weights of each layer"),
    "lamp": _single(magnitude.energy, "global", "layer-adaptive magnitude (Lee et al., ICLR 2021)"),
    "dimap": _single(magnitude.energy, "module", "data-free, module-aware: qkv, proj, mlp (He & Zhou, ICLR 2024)"),
    "taylor": _single(taylor.taylor, "global", "first-order change of the loss (Molchanov et al., CVPR 2019)"),
    "n:m": _single(magnitude.magnitude, "2:4", "N of every M consecutive weights stay", free_scope=True),
    "ovit": _blockwise(
        cap.ovit,
        cap.joint_update,
        "greedy second-order elimination in blocks, and the update (CAP, NeurIPS 2023); also N:M",
    ),
    "ovit-increments": _blockwise(
        cap.ovit_increments,
        cap.joint_update,
        "the same elimination, ranked by what each weight adds to its block's loss (ours)",
    ),
    "woodfisher": _blockwise(
        cap.woodfisher,
        cap.independent_update,
        "what a weight costs alone, and the sum of single updates (NeurIPS 2020)",
    ),
    "woodfisher-joint": _blockwise(
        cap.with_joint_update(cap.woodfisher), cap.joint_update, "the masks of woodfisher, and the update of ovit"
    ),
    "fisher-diagonal": _single(
        cap.fisher_diagonal, "global", "squared weight times the diagonal of Fisher: ovit in blocks of one", True
    ),
    "fastcap": Method(
        fastcap.fastcap,
        {"weight": "layer"},
        ("weight",),
        True,
        "one Fisher matrix per layer, its update from left to right (CAP, algorithm 2, as intended)",
        fastcap.columnwise_update,
    ),
    "obc": Method(
        obc.obc,
        {"weight": "global"},
        ("weight",),
        True,
        "rows eliminated by what they read and solved anew (Optimal Brain Compression, NeurIPS 2022); also N:M",
        obc.obc_update,
    ),
    "magnitude-obs": _blockwise(
        cap.with_joint_update(magnitude.magnitude),
        cap.joint_update,
        "smallest weights, and the update of ovit for the rest",
    ),
    "channel-magnitude": _structured(
        magnitude.magnitude, "units whose rows have the least L2 norm (Li et al., ICLR 2017)"
    ),
    "channel-taylor": _structured(taylor.taylor, "units of least first-order change of the loss"),
    "upvits": _upvits(
        fisher.fisher_kl,
        "KL divergence (Yu & Wu, SCIS 2023): to second order, then exactly where it decides who stays",
        rescoring.rescore,
    ),
    "upvits-literal": _upvits(
        leave_one_out.leave_one_out_kl, "the same scores by one removal at a time: slow, the oracle"
    ),
    "upvits-exact": _upvits(exact.exact_kl, "KL divergence exactly, running again only what a removal changes"),
    "upvits-fisher": _upvits(fisher.fisher_kl, "KL divergence to second order, all units from a few backward passes"),
    "upvits-blocks": Method(
        exact.exact_kl,
        {"block": "layer"},
        ("block",),
        False,
        "KL divergence of whole blocks, scored again after each; what is left between two forms hybrid blocks",
    ),
    "upvits-refit": Method(
        units.with_refit_update(fisher.fisher_kl),
        {"ffn": "layer", "attention": "head", "head": "layer"},
        ("ffn", "attention"),
        True,
        "KL divergence to second order, as UP-ViTs selects, and the consumers refitted to the dense outputs",
        units.refit_update,
    ),
    "upvits-global": Method(
        units.with_refit_update(fisher.fisher_kl),
        {"ffn": "macs", "attention": "macs", "head": "macs"},
        ("ffn", "attention"),
        False,
        "KL divergence per MAC saved, all blocks and components competing, and the refit (ours)",
        units.refit_update,
    ),
    "unit-obs": Method(
        units.unit_obs,
        {"ffn": "macs", "attention": "macs", "head": "macs"},
        ("ffn", "attention"),
        True,
        "greedy elimination of units in nats per MAC, attention in a basis of its own, and the refit (ours)",
        units.unit_obs_update,
    ),
    "corp": Method(
        corp.corp,
        {"ffn": "layer"},
        ("ffn",),
        True,
        "FFN units of least energy and weight, what they carried predicted from the rest (CORP, 2026)",
        corp.affine_update,
    ),
}

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


def method_named(name: str) -> Method:
    """The row of a method.

    Raises:
        BadInput: there is none of that name.
    """
    if name not in METHODS:
        raise BadInput(f"method {name!r}: unknown; use one of {', '.join(METHODS)}")
    return METHODS[name]
