"""Detection of residual modules, x + f(x)."""

import pytest
import torch
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from vitprune import BadInput, find_groups
from vitprune.architectures.tracing import residual_branches
from vitprune.architectures.tracing.recorded_run import record_run
from vitprune.architectures.tracing.residual_branches import find_residual_modules
from vitprune.groups import meta_copy


class Adding(nn.Module):
    """A branch that is added to the input, in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.mlp, self.drop = how, Mlp(6, 8, 6), DropPath(0.1)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.drop(self.mlp(x))
        message = {
            "plain": lambda: x + branch,
            "behind": lambda: branch + x,
            "in place": lambda: branch.add_(x),
            "twice": lambda: x + branch + self.mlp(x),
            "turned": lambda: x.flatten(1).reshape(x.shape) + branch,
            "rolled": lambda: x.roll(1, 1).add(branch).roll(-1, 1),
            "in windows": lambda: torch.cat([part + 1 * part.mean() for part in x.split(2, dim=1)], dim=1),
            "first of all": lambda: torch.cat([x[:, :1] + branch[:, :1], x[:, 1:]], dim=1),
            "shifted": lambda: x.roll(1, 1) + branch,
            "swapped": lambda: x.flip(2) + branch,
            "joined wrongly": lambda: torch.cat([x[:, 2:], x[:, :2]], dim=1) + branch,
            "padded": lambda: nn.functional.pad(x[:, :, 1:], (0, 0, 1, 0)) + branch,
            "written into": lambda: written(x, branch) + branch,
            "doubled": lambda: x + x + branch,
            "scaled": lambda: 2 * x + branch,
            "scaled in place": lambda: x.clone().mul_(2) + branch,
            "weighted": lambda: torch.add(branch, x, alpha=2),
            "activated": lambda: (x + branch).relu(),
            "alone": lambda: branch,
            "nothing": lambda: x,
            "broadcast": lambda: x[:, :1] + branch,
            "several": lambda: (x + branch, x),
        }
        return message[self.how]()


def written(x: Tensor, other: Tensor) -> Tensor:
    """Return a copy, a part of which is replaced."""
    copy = x.clone()
    copy[:, :1] = other[:, :1]
    return copy


class Stacked(nn.Module):
    """Two blocks on an image's rows."""

    def __init__(self, *hows: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Adding(how) for how in hows)
        self.pretrained_cfg = {"input_size": (3, 4, 6)}

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            x = x[0] if isinstance(x, tuple) else x
        return x


def residual_modules(model: nn.Module, images: Tensor) -> set[str]:
    return find_residual_modules(record_run(model, images), ["blocks.0", "blocks.1"])


ADDING = ["plain", "behind", "in place", "twice", "turned", "rolled", "in windows", "first of all", "activated"]
OTHERS = [
    *("shifted", "swapped", "joined wrongly", "padded", "written into", "doubled", "scaled"),
    *("scaled in place", "weighted", "alone", "nothing", "broadcast", "several"),
]


@pytest.mark.parametrize("how", ADDING)
def test_residual_modules_are_found(how: str) -> None:
    model, images = Stacked(how, "alone"), torch.randn(2, 3, 4, 6)
    assert residual_modules(model, images) == residual_modules(meta_copy(model), images.to("meta")) == {"blocks.0"}
    (group,) = find_groups(model, ["block"])
    assert group.sublayers == (("blocks.0",), ("blocks.0",))


@pytest.mark.parametrize("how", OTHERS)
def test_other_modules_are_not_found(how: str) -> None:
    model, images = Stacked(how, "alone"), torch.randn(2, 3, 4, 6)
    assert residual_modules(model, images) == residual_modules(meta_copy(model), images.to("meta")) == set()
    with pytest.raises(BadInput, match=r"^blocks.0 \(Adding\): neither it nor any other block of Stacked returns its"):
        find_groups(model, ["block"])


def test_a_module_called_twice_must_be_residual_in_both_calls() -> None:
    for hows, expected in (
        (["plain", "behind"], {"blocks.0"}),
        (["plain", "alone"], set()),
        (["alone", "plain"], set()),
    ):
        model, calls = Stacked("plain", "plain"), iter(hows)
        model.blocks[1] = model.blocks[0]
        model.blocks[0].register_forward_pre_hook(lambda block, given, calls=calls: setattr(block, "how", next(calls)))
        assert find_residual_modules(record_run(model, torch.randn(1, 3, 4, 6)), ["blocks.0"]) == expected


def test_inputs_above_the_size_limit_are_not_tracked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residual_branches, "MAX_ELEMENTS", 71)
    assert residual_modules(Stacked("plain", "plain"), torch.randn(1, 3, 4, 6)) == set()
    monkeypatch.setattr(residual_branches, "MAX_ELEMENTS", 72)
    assert residual_modules(Stacked("plain", "plain"), torch.randn(1, 3, 4, 6)) == {"blocks.0", "blocks.1"}


def test_hooks_are_removed_and_training_mode_is_restored() -> None:
    model = Stacked("plain", "scaled").train()
    assert residual_modules(model, torch.randn(1, 3, 4, 6)) == {"blocks.0"}
    assert all(module.training for module in model.modules())
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.blocks)
