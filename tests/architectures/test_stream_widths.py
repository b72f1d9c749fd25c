"""Narrower residual streams in modules whose forward pass contains the width of the stream."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from vitprune import BadInput, find_groups, shrink
from vitprune.architectures.stream_widths import classes_after_errors
from vitprune.architectures.tracing.example_run import with_example
from vitprune.evaluation.check_model import make_test_model, random_odd_masks
from vitprune.evaluation.check_removal import check_removal
from vitprune.runtime.random_parameters import randomize_parameters


class Heads(nn.Module):
    """Attention that computes all sizes from the width of its input."""

    def __init__(self, width: int, scales_by_width: bool) -> None:
        super().__init__()
        self.heads, self.scales_by_width = 4, scales_by_width
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = (
            self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        )
        scale = (width // self.heads if self.scales_by_width else q.shape[-1]) ** -0.5
        mixed = (q * scale @ k.mT).softmax(-1) @ v
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    def __init__(self, width: int, scales_by_width: bool) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(width), Heads(width, scales_by_width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm(x))


class Small(nn.Module):
    """A transformer of any class, without sizes in attributes."""

    def __init__(self, width: int = 24, scales_by_width: bool = False) -> None:
        super().__init__()
        self.image_size = 16
        self.stem = nn.Conv2d(3, width, 4, stride=4)
        self.blocks = nn.Sequential(*(Block(width, scales_by_width) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.blocks(self.stem(image).flatten(2).transpose(1, 2))
        output: Tensor = self.head(self.norm(x).mean(1))
        return output


def test_reshapes_that_contain_the_width_are_inferred() -> None:
    model = randomize_parameters(Small())
    groups = find_groups(model, ["residual"])
    by_errors = with_example(model, partial(classes_after_errors, [replace(one, resize=None) for one in groups]))
    assert [path for path, _ in by_errors] == ["blocks.0.attn", "blocks.1.attn"]
    assert type(model.blocks[0].attn) is Heads
    inputs = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    assert check_removal(model, groups, random_odd_masks(groups, 0.5), inputs).failures == ()


def test_a_module_that_computes_something_else_is_refused() -> None:
    with pytest.raises(
        BadInput, match=r"blocks.0.attn \(Heads\): with a narrower residual stream it computes somethin"
    ):
        find_groups(Small(scales_by_width=True), ["residual"])


@pytest.mark.parametrize("kinds", [("residual", "head"), ("head", "residual")])
def test_heads_and_stream_are_cut_in_any_order(kinds: tuple[str, ...]) -> None:
    model, image = randomize_parameters(Small()), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    groups = {kind: find_groups(model, [kind]) for kind in kinds}
    masks = {kind: random_odd_masks(found, 0.5) for kind, found in groups.items()}
    one_by_one = copy.deepcopy(model)
    for kind in kinds:
        one_by_one = shrink(one_by_one, find_groups(one_by_one, [kind]), masks[kind])
    together = shrink(copy.deepcopy(model), groups["head"], masks["head"])
    together = shrink(together, groups["residual"], masks["residual"])
    torch.testing.assert_close(one_by_one(image), together(image))


def test_attention_pooling_of_timm() -> None:
    model, images = make_test_model("test_vit3")
    groups = find_groups(model, ["residual"])
    assert check_removal(model, groups, random_odd_masks(groups, 0.5), images).failures == ()
