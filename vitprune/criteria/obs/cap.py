"""CAP (oViT) and what it is compared with: criteria of single weights on Fisher blocks, and their updates."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from vitprune.criteria import Batches, Criterion, Importance, ScoreConfig, Update
from vitprune.criteria.obs.fisher_blocks import (
    FisherBlocks,
    Solve,
    Worth,
    inverse,
    losses,
    one_by_one,
    together,
    updating,
)
from vitprune.criteria.obs.greedy import eliminate, increments
from vitprune.groups import Group


def ovit(model: nn.Module, groups: Sequence[Group], batches: Batches, setting: ScoreConfig) -> Importance:
    """Score a weight by the loss of its block once greedy elimination has come to it, in nats.

    Where N of every M weights are to stay (`setting.pattern`), no run loses more; those that stay are infinite.

    Raises:
        BadInput: no batches, a group that is not of single weights, or rows that are no multiple of M.

    Source: CAP (Kuznedelev et al., NeurIPS 2023), algorithm 1; the cumulative loss of a block, as in its code.
    """

    def worth(fisher: Tensor, weights: Tensor) -> Tensor:
        return eliminate(inverse(fisher), weights, pattern=setting.pattern)

    return _judged(model, groups, batches, setting, worth, together)


def ovit_increments(model: nn.Module, groups: Sequence[Group], batches: Batches, setting: ScoreConfig) -> Importance:
    """Score a weight by what it adds to the loss of its block, made to rise in the order of elimination."""

    def worth(fisher: Tensor, weights: Tensor) -> Tensor:
        return increments(eliminate(inverse(fisher), weights))

    return _judged(model, groups, batches, replace(setting, pattern=None), worth, together)


def woodfisher(model: nn.Module, groups: Sequence[Group], batches: Batches, setting: ScoreConfig) -> Importance:
    """Score a weight by w_q^2 / (2 H_qq), what it costs if it goes alone; each that goes moves the others by itself.

    Source: WoodFisher (Singh & Alistarh, NeurIPS 2020); oBERT (Kurtic et al., EMNLP 2022).
    """
    return _judged(model, groups, batches, setting, _alone, one_by_one)


def fisher_diagonal(model: nn.Module, groups: Sequence[Group], batches: Batches, setting: ScoreConfig) -> Importance:
    """Score a weight by w_q^2 F_qq / 2: blocks of one weight, which can make up for nothing.

    Source: Theis et al. 2018; Liu et al. 2021 for vision; CAP's limit of block size 1.
    """
    alone = FisherBlocks(model, groups, batches, replace(setting, block=1, pattern=None))
    scores = losses(model, groups, alone, lambda fisher, weights: fisher[:, 0] * weights.square() / 2)
    return Importance(scores)


def joint(model: nn.Module, groups: Sequence[Group], batches: Batches, setting: ScoreConfig) -> Update:
    """The update of CAP for masks of any criterion; the images are looked at when it is called."""
    return updating(model, groups, FisherBlocks(model, groups, batches, setting), together)


def independent(model: nn.Module, groups: Sequence[Group], batches: Batches, setting: ScoreConfig) -> Update:
    """The update of WoodFisher for masks of any criterion."""
    return updating(model, groups, FisherBlocks(model, groups, batches, setting), one_by_one)


def with_joint(criterion: Criterion) -> Criterion:
    """The same scores, and the update of CAP."""

    def updated_too(model: nn.Module, groups: Sequence[Group], batches: Batches, setting: ScoreConfig) -> Importance:
        found = criterion(model, groups, batches, setting)
        return replace(found, update=joint(model, groups, batches, setting))

    return updated_too


def _alone(fisher: Tensor, weights: Tensor) -> Tensor:
    return weights.square() / inverse(fisher).diagonal(dim1=1, dim2=2) / 2


def _judged(
    model: nn.Module, groups: Sequence[Group], batches: Batches, setting: ScoreConfig, worth: Worth, solve: Solve
) -> Importance:
    fisher = FisherBlocks(model, groups, batches, setting)
    return Importance(losses(model, groups, fisher, worth), updating(model, groups, fisher, solve))
