"""Remembered results on the meta device are those of torch, and views and operations on values are not remembered."""

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.support.model_zoo import SMALL, ZOO
from vitprune.architectures.tracing import meta_operations
from vitprune.architectures.tracing.meta_operations import RememberedShapes
from vitprune.runtime.outputs import tensors_of


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meta_operations, "_results", {})


def described(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device


def outputs_by_module(model: nn.Module, size: int) -> list[tuple[object, ...]]:
    seen: list[tuple[object, ...]] = []
    handles = [
        module.register_forward_hook(lambda _, args, output: seen.extend(described(one) for one in tensors_of(output)))
        for module in model.modules()
    ]
    with torch.no_grad():
        model(torch.empty(2, 3, size, size, device="meta"))
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", ["vit", "swin", "pvt-linear", "coat_tiny", "levit_128s", "maxvit_pico_rw_256"])
def test_all_modules_of_a_model_return_the_same_shapes(name: str) -> None:
    architecture, args = ZOO[name] if name in ZOO else (name, SMALL[name])
    with torch.device("meta"):
        model = timm.create_model(architecture, **args).eval()
    size = args.get("img_size", 32)
    expected = outputs_by_module(model, size)
    for _ in range(2):  # the second run takes all of them from the first
        with RememberedShapes():
            assert outputs_by_module(model, size) == expected


def test_an_operation_is_computed_once_for_operands_of_the_same_shapes() -> None:
    one, two = (torch.empty(2, 5, device="meta") for _ in range(2))
    others = (one.double(), one.T, torch.empty(2, 6, device="meta"))
    expected = [described(other.softmax(-1)) for other in others]
    with RememberedShapes():
        results = [x.softmax(-1) for x in (one, two)]
        known = len(meta_operations._results)
        assert described(results[0]) == described(results[1]) == described(one)
        assert results[0] is not results[1]
        assert [described(other.softmax(-1)) for other in others] == expected
    assert len(meta_operations._results) > known


def test_views_and_changes_in_place_refer_to_their_tensor() -> None:
    x = torch.empty(4, 6, device="meta")
    with RememberedShapes():
        for _ in range(2):
            part = x[1:, 2:]
            assert part._base is x
            assert described(part)[1:3] == ((6, 1), 8)
            assert x.add_(1) is x


def test_values_are_computed() -> None:
    with RememberedShapes():
        for number in range(2):
            assert torch.full((2,), float(number)).sum().item() == 2 * number
            torch.testing.assert_close(torch.ones(3).softmax(0), torch.full((3,), 1 / 3))
        with pytest.raises(RuntimeError):
            torch.empty(3, device="meta").sum().item()


def test_the_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meta_operations, "CAPACITY", 8)
    with RememberedShapes():
        for width in range(1, 30):
            assert torch.empty(width, device="meta").exp().shape == (width,)
    assert len(meta_operations._results) <= 8
