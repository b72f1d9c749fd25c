"""Forward passes whose reshapes infer the width of heads."""

import copy

import torch
from torch import Tensor, nn

from vitprune.architectures.inferred_widths import inferring_classes


class Heads(nn.Module):
    """Attention whose sizes come from the width of its input."""

    def __init__(self, width: int = 24, heads: int = 4, *, scale: float = 0.5):
        super().__init__()
        self.heads, self.scale = heads, scale
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, *, shift: float = 1.0) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self._split(x).unbind(2)
        mixed = (q * self.scale @ k.mT + shift).softmax(-1) @ v
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))

    def _split(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        rows = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        return rows.permute(0, 3, 2, 1, 4)


class Decorated(Heads):
    """A method with a decorator is not rewritten."""

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def kind_of(module: nn.Module, x: Tensor) -> type[nn.Module]:
    return dict(inferring_classes(module, {24, 6}, lambda: module(x))).get("", type(module))


def test_the_class_computes_the_same_function_and_accepts_other_widths() -> None:
    torch.manual_seed(0)
    dense, x = Heads(), torch.randn(2, 5, 24)
    with torch.no_grad():
        expected = dense(x, shift=2.0)
        kind = kind_of(dense, x)
        assert type(dense) is Heads  # its class is not changed
        assert issubclass(kind, Heads)
        assert kind_of(copy.deepcopy(dense), x) is kind
        dense.__class__ = kind
        assert torch.equal(dense(x, shift=2.0), expected)
        narrow = copy.deepcopy(dense)
        rows = torch.arange(72).view(3, 24)[:, :12].flatten()  # two of four heads
        narrow.qkv.weight, narrow.qkv.bias = (nn.Parameter(p[rows]) for p in (dense.qkv.weight, dense.qkv.bias))
        narrow.proj.weight, narrow.heads = nn.Parameter(dense.proj.weight[:, :12]), 2
        dense.proj.weight[:, 12:] = 0
        torch.testing.assert_close(narrow(x), dense(x))


def test_methods_that_cannot_be_rewritten_are_not_changed() -> None:
    x = torch.randn(1, 5, 24)
    assert kind_of(nn.Linear(24, 24), x) is nn.Linear
    kind = kind_of(Decorated(), x)
    assert "forward" not in vars(kind)
    assert "_split" in vars(kind)
