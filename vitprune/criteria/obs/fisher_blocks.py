"""Block-diagonal empirical Fisher (CAP): collection, inverse, block-wise scores and updates."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from vitprune.config.score_config import ScoreConfig
from vitprune.criteria import Batches, ScoringContext, Update
from vitprune.criteria.obs.gradients import GRADIENTS_AT_ONCE, count_gradients, weight_gradients
from vitprune.criteria.obs.weight_blocks import BlockRange, chunk_by_memory, fitting_groups, split_into_blocks
from vitprune.errors import BadInput
from vitprune.groups import Group, Masks, Scores
from vitprune.runtime.progress import track

BLOCKS_AT_ONCE, BLOCKS_PER_PRODUCT = 64, 16  # few enough to fit into the CPU cache
STRIPS, MIN_STRIP_SIZE = 4, 96  # strips per block, and the block size from which the upper triangle is skipped

# damped Fisher (blocks, B, B), weights (blocks, B) -> losses (blocks, B)
BlockScoreFn = Callable[[Tensor, Tensor], Tensor]
# damped Fisher, weights, kept weights (blocks, B) -> new weights (blocks, B)
BlockSolveFn = Callable[[Tensor, Tensor, Tensor], Tensor]


class FisherBlocks:
    """Damped Fisher blocks F = damping I + 1/m sum_i g_i g_i^T of all weights of some groups, in float64.

    Iterates over (block range, matrices) any number of times. If the matrices exceed `context.config.memory`, they are
    collected in chunks, with the gradients recomputed for every chunk; otherwise they are collected once and cached.
    Groups that do not fit `context.pattern` have no blocks.

    Args:
        model: The model.
        groups: Groups of kind `weight`.
        batches: Labeled calibration batches.
        context: The scoring options.

    Raises:
        BadInput: a group of another kind, or too few images.

    Source: CAP section 3.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group], batches: Batches, context: ScoringContext):
        every = context.pattern[1] if context.pattern else 1
        fitting = fitting_groups(model, groups, every)
        parts = split_into_blocks(model, fitting, context.config.fisher_block_size, every)
        count_gradients(batches, context)
        held = max(len(labels) for _, labels in batches) if context.config.per_sample else GRADIENTS_AT_ONCE
        self.model, self.batches, self.context = model, batches, context
        self.chunks = chunk_by_memory(parts, context.config.memory, held)
        self._cache: dict[BlockRange, Tensor] = {}

    def __iter__(self) -> Iterator[tuple[BlockRange, Tensor]]:
        """Yield every block range with its matrices (blocks, B, B), float64; do not modify them."""
        if self._cache:
            yield from self._cache.items()
            return
        for number in track(range(len(self.chunks)), "collecting Fisher blocks"):
            yield from self.chunk(number)

    def chunk(self, number: int) -> Iterator[tuple[BlockRange, Tensor]]:
        """Yield the block ranges of one chunk with their matrices."""
        if self._cache:
            yield from self._cache.items()
            return
        result = _collect_blocks(self.model, self.chunks[number], self.batches, self.context, f"fisher-{number}")
        if len(self.chunks) == 1:
            self._cache = dict(result)
        for part in self.chunks[number]:
            yield part, result.pop(part)


def _collect_blocks(
    model: nn.Module, parts: Sequence[BlockRange], batches: Batches, context: ScoringContext, name: str
) -> dict[BlockRange, Tensor]:
    """Return the damped Fisher blocks of block ranges; `context.partial` holds the partial sums under a name."""
    device, notes = next(model.parameters()).device, context.partial
    noted = notes.read(name) if notes else {}
    done = int(noted["done"]) if noted else 0
    sums = {}
    for part in parts:
        fresh = torch.zeros(part.blocks, part.size, part.size, dtype=torch.float64)
        sums[part] = noted.get(_label(part), fresh).to(device)
    for number, (part, values) in enumerate(weight_gradients(model, parts, batches, context, done), 1):
        add_outer_products(sums[part], values)
        if notes and number % len(parts) == 0 and notes.due():
            rounds = torch.tensor(done + number // len(parts))
            notes.write(name, {_label(part): total for part, total in sums.items()} | {"done": rounds})
    number = count_gradients(batches, context)
    for total in sums.values():
        symmetrize(context.dist.all_reduce(total))
        total /= number
        total.diagonal(dim1=1, dim2=2).add_(_effective_damping(context.config, number))
    return sums


def _label(part: BlockRange) -> str:
    return f"{part.param}/{part.start}"


def _effective_damping(config: ScoreConfig, gradients: int) -> float:
    """Return the damping that is added to the diagonal."""
    # A per-image gradient has `gradient_batch` times the variance of a batch gradient, and masks and updates depend
    # only on the ratio of Fisher and damping: per-image Fisher matrices get `gradient_batch` times the damping.
    return config.damping_for(gradients) * (config.gradient_batch if config.per_sample else 1)


def add_outer_products(total: Tensor, values: Tensor) -> None:
    """Add the outer products of gradients (m, weights) to sums (blocks, B, B), only on and left of the diagonal strips.

    The rest is filled by `symmetrize`. The sum is in float64: float32 loses damping below 1e-6 of the largest entry.
    """
    blocks, size, _ = total.shape
    by_block = values.view(len(values), blocks, size)
    if size == 1:
        total += by_block.double().square().sum(dim=0)[:, None]
        return
    block_step = BLOCKS_PER_PRODUCT if total.device.type == "cpu" else blocks
    strip = -(-size // STRIPS) if size >= MIN_STRIP_SIZE else size
    for at in range(0, blocks, block_step):
        rows = by_block[:, at : at + block_step].transpose(0, 1).double()  # (blocks, gradients, B)
        for kept in range(0, size, strip):
            right = min(kept + strip, size)
            total[at : at + block_step, kept:right, :right].baddbmm_(rows[:, :, kept:right].mT, rows[:, :, :right])


def symmetrize(total: Tensor) -> None:
    """Copy the lower triangle of the sums (blocks, B, B) to the upper one, in place."""
    for at in range(0, len(total), BLOCKS_AT_ONCE):
        part = total[at : at + BLOCKS_AT_ONCE]
        part.copy_(part.tril() + part.tril(-1).mT)


def invert_blocks(fisher: Tensor) -> Tensor:
    """Return the inverses of damped Fisher blocks, (blocks, B, B).

    Raises:
        BadInput: a block is not positive definite.
    """
    return torch.cholesky_inverse(_factor(fisher)).mT  # contiguous rows, as the elimination needs


def blockwise_scores(model: nn.Module, groups: Sequence[Group], fisher: FisherBlocks, score_fn: BlockScoreFn) -> Scores:
    """Score every weight by a function of its block; float64, in the shape of the group. Without blocks: infinity.

    Block ranges are divided among the processes. Chunks whose scores all processes have saved are not collected again.

    Args:
        model: The model.
        groups: Groups of kind `weight`.
        fisher: The Fisher blocks of all groups.
        score_fn: Losses of the weights of some blocks.
    """
    team, notes = fisher.context.dist, fisher.context.partial
    scores = {group.slices[0].param: torch.zeros(group.units, dtype=torch.float64) for group in groups}
    for number, parts in enumerate(track(fisher.chunks, "collecting Fisher blocks")):
        result = notes.read(f"scores-{number}") if notes else {}
        if float(team.all_reduce(torch.tensor(float(bool(result))))) < team.size:
            result = _local_losses(model, fisher, number, score_fn)
            if notes:
                notes.write(f"scores-{number}", result)
                notes.write(f"fisher-{number}", {})
        for part in parts:
            scores[part.param][part.start : part.stop] = result[_label(part)]
    with_blocks = {part.param for parts in fisher.chunks for part in parts}
    for param, score in scores.items():
        scores[param] = team.all_reduce(score) if param in with_blocks else torch.full_like(score, torch.inf)
    return {group.name: scores[group.slices[0].param].view(group.shape) for group in groups}


def _local_losses(model: nn.Module, fisher: FisherBlocks, chunk: int, score_fn: BlockScoreFn) -> dict[str, Tensor]:
    """Losses of this process's block ranges in a chunk, zeros for the others; (weights,) each."""
    result = {}
    for number, (part, matrices) in enumerate(fisher.chunk(chunk)):
        if fisher.context.dist.owns(number):
            weights = _weights(model, part)
            size = _at_once(matrices)
            pieces = zip(torch.split(matrices, size), torch.split(weights, size), strict=True)
            result[_label(part)] = torch.cat([score_fn(*piece) for piece in pieces]).flatten().cpu()
        else:
            result[_label(part)] = torch.zeros(part.stop - part.start, dtype=torch.float64)
    return result


def blockwise_update(model: nn.Module, groups: Sequence[Group], fisher: FisherBlocks, solve: BlockSolveFn) -> Update:
    """Return the update that solves every block for given masks; the blocks are collected when it is called.

    Args:
        model: The model.
        groups: Groups of kind `weight`.
        fisher: The Fisher blocks of all groups.
        solve: New weights of some blocks.
    """

    def update(masks: Masks) -> dict[str, Tensor]:
        keep_flat = {g.slices[0].param: masks[g.name].flatten() for g in groups if g.name in masks}
        result = {param: model.get_parameter(param).detach().double().cpu().flatten() for param in keep_flat}
        for part, matrices in fisher:
            if part.param not in keep_flat:
                continue
            weights = _weights(model, part)
            keep = keep_flat[part.param][part.start : part.stop].view(weights.shape).to(weights.device)
            size = _at_once(matrices)
            pieces = zip(*(torch.split(values, size) for values in (matrices, weights, keep)), strict=True)
            new = torch.cat([solve(*piece) for piece in pieces])
            result[part.param][part.start : part.stop] = new.flatten().cpu()
        return {param: value.view(model.get_parameter(param).shape) for param, value in result.items()}

    return update


def solve_jointly(fisher: Tensor, weights: Tensor, keep: Tensor) -> Tensor:
    """Return the optimal weights of every block for a mask: w_R + F_RR^-1 F_RS w_S, 0 on the removed set S.

    Rows and columns of F on S are replaced by the identity, so that blocks with any masks are solved in one batch.

    Source: CAP; sequential OBS steps lead to this solution in any order.
    """
    removed = torch.where(keep, 0.0, weights)
    target = torch.einsum("bij,bj->bi", fisher, removed) * keep
    kept = fisher * (keep[:, :, None] & keep[:, None, :])
    kept.diagonal(dim1=1, dim2=2).add_((~keep).double())
    solved = torch.cholesky_solve(target[..., None], _factor(kept))[..., 0]
    return torch.where(keep, weights + solved, 0.0)


def solve_independently(fisher: Tensor, weights: Tensor, keep: Tensor) -> Tensor:
    """Return the weights after the sum of the OBS updates of every removed weight alone; (blocks, B).

    Source: WoodFisher (Singh & Alistarh 2020), equation 6, applied to many weights at once as in oBERT.
    """
    result = invert_blocks(fisher)
    removed = torch.where(keep, 0.0, weights) / result.diagonal(dim1=1, dim2=2)
    return torch.where(keep, weights - torch.einsum("bij,bj->bi", result, removed), 0.0)


def _weights(model: nn.Module, part: BlockRange) -> Tensor:
    flat = model.get_parameter(part.param).detach().flatten()[part.start : part.stop]
    return flat.double().view(part.blocks, part.size)


def _at_once(matrices: Tensor) -> int:
    """Number of blocks per batched operation."""
    size = matrices.shape[1]
    return max(1, BLOCKS_AT_ONCE * 192**2 // size**2 * (1 if matrices.device.type == "cpu" else 64))


def _factor(fisher: Tensor) -> Tensor:
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(fisher)
    if bool(info.any()):
        why = "a Fisher block is not positive definite"
        raise BadInput(f"score.damping: {why}; raise it, or check the weights and images")
    return factor
