"""Structured and unstructured pruning of vision transformers: UP-ViTs, DIMAP, CAP/oViT, OBC and others.

Names are imported on first use (PEP 562), so that `import vitprune` does not import torch or timm.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitprune.architectures import find_groups, merge_heads
    from vitprune.architectures.token_merging import merge_tokens
    from vitprune.config.allocation_config import AllocationConfig
    from vitprune.config.prune_config import PruneConfig, Schedule
    from vitprune.config.reconstruct_config import ReconstructConfig
    from vitprune.config.score_config import ScoreConfig
    from vitprune.config.train_config import DistillConfig, TrainConfig
    from vitprune.errors import BadInput
    from vitprune.evaluation.accuracy import accuracy
    from vitprune.evaluation.check_model import check
    from vitprune.evaluation.cost import count
    from vitprune.evaluation.evaluate import evaluate
    from vitprune.evaluation.latency import latency
    from vitprune.groups import Group, Masks, ParamSlice, Scores, permute, shrink, zero
    from vitprune.models.card import write_card
    from vitprune.models.export import export_onnx
    from vitprune.models.fp16 import onnx_to_fp16
    from vitprune.models.io import load, save
    from vitprune.models.openvino_ir import onnx_to_openvino
    from vitprune.models.other_libraries import load_into
    from vitprune.models.pt2 import export_pt2
    from vitprune.pruning.gradual_prune import gradual_prune
    from vitprune.pruning.methods import CRITERIA, METHODS
    from vitprune.pruning.plan import plan_for
    from vitprune.pruning.prune import PruneResult, prune, score
    from vitprune.pruning.select import select
    from vitprune.training.finetune import finetune
    from vitprune.training.frozen_zeros import freeze_zeros

__version__ = "0.1.0"

_MODULES = {
    "architectures": ("find_groups", "merge_heads"),
    "architectures.token_merging": ("merge_tokens",),
    "config.prune_config": ("PruneConfig", "Schedule"),
    "config.allocation_config": ("AllocationConfig",),
    "config.reconstruct_config": ("ReconstructConfig",),
    "config.score_config": ("ScoreConfig",),
    "config.train_config": ("DistillConfig", "TrainConfig"),
    "errors": ("BadInput",),
    "evaluation.accuracy": ("accuracy",),
    "evaluation.cost": ("count",),
    "evaluation.evaluate": ("evaluate",),
    "evaluation.latency": ("latency",),
    "evaluation.check_model": ("check",),
    "groups": ("Group", "Masks", "ParamSlice", "Scores", "permute", "shrink", "zero"),
    "models.card": ("write_card",),
    "models.export": ("export_onnx",),
    "models.fp16": ("onnx_to_fp16",),
    "models.openvino_ir": ("onnx_to_openvino",),
    "models.pt2": ("export_pt2",),
    "models.io": ("load", "save"),
    "models.other_libraries": ("load_into",),
    "pruning.gradual_prune": ("gradual_prune",),
    "pruning.methods": ("CRITERIA", "METHODS"),
    "pruning.plan": ("plan_for",),
    "pruning.prune": ("PruneResult", "prune", "score"),
    "pruning.select": ("select",),
    "training.finetune": ("finetune",),
    "training.frozen_zeros": ("freeze_zeros",),
}
_MODULE_OF = {name: f"vitprune.{module}" for module, names in _MODULES.items() for name in names}

__all__ = [
    "CRITERIA",
    "METHODS",
    "AllocationConfig",
    "BadInput",
    "DistillConfig",
    "Group",
    "Masks",
    "ParamSlice",
    "PruneConfig",
    "PruneResult",
    "ReconstructConfig",
    "Schedule",
    "ScoreConfig",
    "Scores",
    "TrainConfig",
    "accuracy",
    "check",
    "count",
    "evaluate",
    "export_onnx",
    "export_pt2",
    "find_groups",
    "finetune",
    "freeze_zeros",
    "gradual_prune",
    "latency",
    "load",
    "load_into",
    "merge_heads",
    "merge_tokens",
    "onnx_to_fp16",
    "onnx_to_openvino",
    "permute",
    "plan_for",
    "prune",
    "save",
    "score",
    "select",
    "shrink",
    "write_card",
    "zero",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'vitprune' has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
