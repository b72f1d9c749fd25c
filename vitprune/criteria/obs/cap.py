"""CAP (oViT), WoodFisher, diagonal Fisher: importance of single weights on Fisher blocks, and weight updates."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from vitprune.criteria import Batches, Criterion, Importance, ScoringContext, Update
from vitprune.criteria.obs.fisher_blocks import (
    BlockScoreFn,
    BlockSolveFn,
    FisherBlocks,
    blockwise_scores,
    blockwise_update,
    invert_blocks,
    solve_independently,
    solve_jointly,
)
from vitprune.criteria.obs.greedy import eliminate_weights, loss_increments
from vitprune.groups import Group


def ovit(model: nn.Module, groups: Sequence[Group], batches: Batches, context: ScoringContext) -> Importance:
    """Score a weight by the cumulative loss of its block at its step of greedy OBS elimination, in nats.

    At every step the weight with the least w_p^2 / (2 [F^-1]_pp) is removed and the others are updated. With
    `context.pattern` (N, M), at most M - N of every M consecutive weights are removed; the others score infinity.

    Args:
        model: The model.
        groups: Groups of kind `weight`.
        batches: Labeled calibration batches.
        context: The scoring options.

    Raises:
        BadInput: no batches, a group of another kind, or rows that are not divisible by M.

    Source: CAP (Kuznedelev et al., NeurIPS 2023), algorithm 1; cumulative loss as in its released code.
    """

    def loss(fisher: Tensor, weights: Tensor) -> Tensor:
        return eliminate_weights(invert_blocks(fisher), weights, pattern=context.pattern)

    return _blockwise_importance(model, groups, batches, context, loss, solve_jointly)


def ovit_increments(model: nn.Module, groups: Sequence[Group], batches: Batches, context: ScoringContext) -> Importance:
    """Score a weight by its loss increment in the same elimination, made monotone in the order of removal."""

    def loss(fisher: Tensor, weights: Tensor) -> Tensor:
        return loss_increments(eliminate_weights(invert_blocks(fisher), weights))

    return _blockwise_importance(model, groups, batches, replace(context, pattern=None), loss, solve_jointly)


def woodfisher(model: nn.Module, groups: Sequence[Group], batches: Batches, context: ScoringContext) -> Importance:
    """Score a weight by w_q^2 / (2 [F^-1]_qq), the loss of its removal alone; the update sums single updates.

    Source: WoodFisher (Singh & Alistarh, NeurIPS 2020); oBERT (Kurtic et al., EMNLP 2022).
    """
    return _blockwise_importance(model, groups, batches, context, _single_weight_loss, solve_independently)


def fisher_diagonal(model: nn.Module, groups: Sequence[Group], batches: Batches, context: ScoringContext) -> Importance:
    """Score a weight by w_q^2 F_qq / 2, Fisher blocks of size 1; no update.

    Source: Theis et al. 2018; Liu et al. 2021 for vision; CAP with block size 1.
    """
    config = context.config.model_copy(update={"fisher_block_size": 1})
    diagonal = FisherBlocks(model, groups, batches, replace(context, config=config, pattern=None))
    scores = blockwise_scores(model, groups, diagonal, lambda fisher, weights: fisher[:, 0] * weights.square() / 2)
    return Importance(scores)


def joint_update(model: nn.Module, groups: Sequence[Group], batches: Batches, context: ScoringContext) -> Update:
    """Return CAP's update (`solve_jointly`) for masks of any criterion; gradients are taken when it is called."""
    return blockwise_update(model, groups, FisherBlocks(model, groups, batches, context), solve_jointly)


def independent_update(model: nn.Module, groups: Sequence[Group], batches: Batches, context: ScoringContext) -> Update:
    """Return WoodFisher's update (`solve_independently`) for masks of any criterion."""
    return blockwise_update(model, groups, FisherBlocks(model, groups, batches, context), solve_independently)


def with_joint_update(criterion: Criterion) -> Criterion:
    """Return a criterion with the scores of the given one and CAP's update."""

    def updated(model: nn.Module, groups: Sequence[Group], batches: Batches, context: ScoringContext) -> Importance:
        importance = criterion(model, groups, batches, context)
        return replace(importance, update=joint_update(model, groups, batches, context))

    return updated


def _single_weight_loss(fisher: Tensor, weights: Tensor) -> Tensor:
    return weights.square() / invert_blocks(fisher).diagonal(dim1=1, dim2=2) / 2


def _blockwise_importance(
    model: nn.Module,
    groups: Sequence[Group],
    batches: Batches,
    context: ScoringContext,
    loss: BlockScoreFn,
    solve: BlockSolveFn,
) -> Importance:
    fisher = FisherBlocks(model, groups, batches, context)
    return Importance(blockwise_scores(model, groups, fisher, loss), blockwise_update(model, groups, fisher, solve))
