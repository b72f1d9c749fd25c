"""CAP's Fisher: one matrix per block of weights, summed over gradients and damped, and what is solved with it."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from vitprune.criteria import Batches, ScoreConfig, Update
from vitprune.criteria.obs.gradients import HELD, gradients, number_of
from vitprune.criteria.obs.weight_blocks import Part, parts_of, portions
from vitprune.errors import BadInput
from vitprune.groups import Group, Masks, Scores
from vitprune.runtime.progress import track

TOGETHER, FEW = 64, 16  # blocks at a time, so that their matrices and gradients stay near the processor
STRIPS, WIDE = 4, 96  # of a block that is wide enough: what lies right of a strip's diagonal is not computed

Worth = Callable[[Tensor, Tensor], Tensor]  # damped Fisher (blocks, B, B) and weights (blocks, B) -> losses (blocks, B)
Solve = Callable[[Tensor, Tensor, Tensor], Tensor]  # the same and what stays (blocks, B) -> new weights (blocks, B)


class FisherBlocks:
    """Damped Fisher blocks of all weights of some groups, part by part, as often as one likes.

    Those of a few layers are held at a time, as many as `setting.memory` allows; for the next ones the same gradients
    are taken again. Where all fit at once, they are taken once and kept.

    Raises:
        BadInput: a group is not one of single weights, or there are too few images.

    Source: CAP section 3 (block-diagonal empirical Fisher); F = damp I + 1/m sum g g^T, in float64.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group], batches: Batches, setting: ScoreConfig):
        parts = parts_of(model, groups, setting.block, setting.pattern[1] if setting.pattern else 1)
        number_of(batches, setting)
        held = max(len(labels) for _, labels in batches) if setting.per_sample else HELD
        self.model, self.batches, self.setting = model, batches, setting
        self.portions = portions(parts, setting.memory, held)
        self._kept: dict[Part, Tensor] = {}

    def __iter__(self) -> Iterator[tuple[Part, Tensor]]:
        """Every part with its matrices (blocks, B, B), float64 on the model's device; do not change them."""
        if self._kept:
            yield from self._kept.items()
            return
        for number in track(range(len(self.portions)), "collecting Fisher blocks"):
            yield from self.portion(number)

    def portion(self, number: int) -> Iterator[tuple[Part, Tensor]]:
        """The parts of one portion with their matrices."""
        if self._kept:
            yield from self._kept.items()
            return
        found = collect(self.model, self.portions[number], self.batches, self.setting, f"fisher-{number}")
        if len(self.portions) == 1:
            self._kept = dict(found)
        for part in self.portions[number]:
            yield part, found.pop(part)


def collect(
    model: nn.Module, parts: Sequence[Part], batches: Batches, setting: ScoreConfig, name: str = "fisher"
) -> dict[Part, Tensor]:
    """Damped Fisher blocks of some parts; (blocks, B, B) each. Sums that were noted under the name are taken up.

    A gradient of one image has `gradient_batch` times the variance of one of a batch, and the damping goes with it:
    masks and weights depend on their ratio alone.
    """
    device, notes = next(model.parameters()).device, setting.notes
    noted = notes.read(name) if notes else {}
    done = int(noted["done"]) if noted else 0
    sums = {}
    for part in parts:
        fresh = torch.zeros(part.blocks, part.size, part.size, dtype=torch.float64)
        sums[part] = noted.get(_label(part), fresh).to(device)
    for number, (part, values) in enumerate(gradients(model, parts, batches, setting, done), 1):
        add(sums[part], values)
        if notes and number % len(parts) == 0 and notes.due():
            rounds = torch.tensor(done + number // len(parts))
            notes.write(name, {_label(part): total for part, total in sums.items()} | {"done": rounds})
    number = number_of(batches, setting)
    for total in sums.values():
        complete(setting.team.all_reduce(total))
        total /= number
        total.diagonal(dim1=1, dim2=2).add_(damping(setting))
    return sums


def _label(part: Part) -> str:
    return f"{part.param}/{part.start}"


def damping(setting: ScoreConfig) -> float:
    """What is added to the diagonal: `damp` where gradients are of batches, as in the paper."""
    return setting.damp * (setting.gradient_batch if setting.per_sample else 1)


def add(total: Tensor, values: Tensor) -> None:
    """Add the products of gradients (gradients, weights) to the sums (blocks, B, B) of their blocks, in strips.

    What is right of the diagonal stays behind until `complete`. float32 would lose the damping as soon as it is a
    millionth of the largest entry, however the sum is formed.
    """
    blocks, size, _ = total.shape
    lined = values.view(len(values), blocks, size)
    if size == 1:
        total += lined.double().square().sum(dim=0)[:, None]
        return
    few, strip = FEW if total.device.type == "cpu" else blocks, -(-size // STRIPS) if size >= WIDE else size
    for at in range(0, blocks, few):
        rows = lined[:, at : at + few].transpose(0, 1).double()  # (blocks, gradients, B)
        for left in range(0, size, strip):
            right = min(left + strip, size)
            total[at : at + few, left:right, :right].baddbmm_(rows[:, :, left:right].mT, rows[:, :, :right])


def complete(total: Tensor) -> None:
    """Mirror what `add` has summed, so that the matrices (blocks, B, B) are symmetric."""
    for at in range(0, len(total), TOGETHER):
        few = total[at : at + TOGETHER]
        few.copy_(few.tril() + few.tril(-1).mT)


def inverse(fisher: Tensor) -> Tensor:
    """Inverses of damped Fisher blocks, (blocks, B, B).

    Raises:
        BadInput: one has none, as it is not positive definite.
    """
    return torch.cholesky_inverse(_factor(fisher)).mT  # symmetric, and so in rows, as the elimination reads it


def losses(model: nn.Module, groups: Sequence[Group], fisher: FisherBlocks, worth: Worth) -> Scores:
    """What every weight is worth, by a function of its block; one float64 score per weight.

    Portions whose scores all processes of the team have noted are not collected again.
    """
    team, notes = fisher.setting.team, fisher.setting.notes
    scores = {group.slices[0].param: torch.zeros(group.units, dtype=torch.float64) for group in groups}
    for number, parts in enumerate(track(fisher.portions, "collecting Fisher blocks")):
        found = notes.read(f"scores-{number}") if notes else {}
        if float(team.all_reduce(torch.tensor(float(bool(found))))) < team.size:
            found = _own_losses(model, fisher, number, worth)
            if notes:
                notes.write(f"scores-{number}", found)
                notes.write(f"fisher-{number}", {})
        for part in parts:
            scores[part.param][part.start : part.stop] = found[_label(part)]
    return {group.name: team.all_reduce(scores[group.slices[0].param]).view(group.shape) for group in groups}


def _own_losses(model: nn.Module, fisher: FisherBlocks, portion: int, worth: Worth) -> dict[str, Tensor]:
    """Losses of this process's own parts of a portion, zeros of the others; (weights,) each."""
    found = {}
    for number, (part, matrices) in enumerate(fisher.portion(portion)):
        if fisher.setting.team.owns(number):
            weights = _weights(model, part)
            starts = range(0, part.blocks, _at_once(matrices))
            pieces = [worth(matrices[n : n + starts.step], weights[n : n + starts.step]) for n in starts]
            found[_label(part)] = torch.cat(pieces).flatten().cpu()
        else:
            found[_label(part)] = torch.zeros(part.stop - part.start, dtype=torch.float64)
    return found


def updating(model: nn.Module, groups: Sequence[Group], fisher: FisherBlocks, solve: Solve) -> Update:
    """The update that solves every block for the weights that stay; the blocks are collected when it is called."""

    def update(masks: Masks) -> dict[str, Tensor]:
        kept = {g.slices[0].param: masks[g.name].flatten() for g in groups if g.name in masks}
        found = {param: model.get_parameter(param).detach().double().cpu().flatten() for param in kept}
        for part, matrices in fisher:
            if part.param not in kept:
                continue
            weights = _weights(model, part)
            keep = kept[part.param][part.start : part.stop].view(weights.shape).to(weights.device)
            starts = range(0, part.blocks, _at_once(matrices))
            new = [
                solve(matrices[n : n + starts.step], weights[n : n + starts.step], keep[n : n + starts.step])
                for n in starts
            ]
            found[part.param][part.start : part.stop] = torch.cat(new).flatten().cpu()
        return {param: value.view(model.get_parameter(param).shape) for param, value in found.items()}

    return update


def together(fisher: Tensor, weights: Tensor, keep: Tensor) -> Tensor:
    """The best weights for what stays of each block: w_R + F_RR^-1 F_RS w_S; (blocks, B), zero where nothing stays.

    Where F is not wanted, unit rows take its place, so that blocks of different masks are solved at once.

    Source: CAP, the joint solution to which its steps lead, in whatever order they are taken.
    """
    gone = torch.where(keep, 0.0, weights)
    wanted = torch.einsum("bij,bj->bi", fisher, gone) * keep
    left = fisher * (keep[:, :, None] & keep[:, None, :])
    left.diagonal(dim1=1, dim2=2).add_((~keep).double())
    solved = torch.cholesky_solve(wanted[..., None], _factor(left))[..., 0]
    return torch.where(keep, weights + solved, 0.0)


def one_by_one(fisher: Tensor, weights: Tensor, keep: Tensor) -> Tensor:
    """What stays after the sum of what each weight that goes would do alone; (blocks, B).

    Source: WoodFisher (Singh & Alistarh 2020), equation 6, as oBERT applies it to many weights at once.
    """
    found = inverse(fisher)
    gone = torch.where(keep, 0.0, weights) / found.diagonal(dim1=1, dim2=2)
    return torch.where(keep, weights - torch.einsum("bij,bj->bi", found, gone), 0.0)


def _weights(model: nn.Module, part: Part) -> Tensor:
    flat = model.get_parameter(part.param).detach().flatten()[part.start : part.stop]
    return flat.double().view(part.blocks, part.size)


def _at_once(matrices: Tensor) -> int:
    """Blocks that are worked on together: few on a processor, as many as there are on a GPU."""
    size = matrices.shape[1]
    return max(1, TOGETHER * 192**2 // size**2 * (1 if matrices.device.type == "cpu" else 64))


def _factor(fisher: Tensor) -> Tensor:
    factor: Tensor
    factor, wrong = torch.linalg.cholesky_ex(fisher)
    if bool(wrong.any()):
        raise BadInput("score.damp: a Fisher block is not positive definite; raise it, or check the weights and images")
    return factor
