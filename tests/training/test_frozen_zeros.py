"""`freeze_zeros`: pruned weights are exactly zero after every step of every optimizer, also in averages."""

from collections.abc import Callable
from typing import Any

import pytest
import timm.optim
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

import vitprune
from tests.support.model_zoo import batches, tiny
from vitprune import BadInput

OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), 1e-2),
    "lbfgs": lambda model: torch.optim.LBFGS(model.parameters(), max_iter=3),
    **{
        name: lambda model, name=name: timm.optim.create_optimizer_v2(model, name, lr=1e-2)
        for name in ("muon", "adafactor", "lamb", "lookahead_adamw")
    },
}


def zeros_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter == 0 for name, parameter in model.named_parameters() if name.startswith("blocks")}


def step(model: nn.Module, optimizer: Any, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        return loss

    optimizer.step(closure)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_remain_with_every_optimizer(name: str) -> None:
    dense = tiny("vit")
    model = vitprune.prune(dense, "magnitude", sparsity=0.5).model
    optimizer, averages = OPTIMIZERS[name](model), [ModelEmaV3(dense, decay=0.5), AveragedModel(dense)]
    step(model, optimizer, batches(model, 1)[0])  # state of the optimizer from before
    model.load_state_dict(vitprune.prune(dense, "magnitude", sparsity=0.5).model.state_dict())
    before = zeros_of(model)
    with vitprune.freeze_zeros(model, optimizer, averages=averages):
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0) if name == "sgd" else None
        for batch in batches(model, 8):
            step(model, optimizer, batch)
            averages[0].update(model)
            averages[1].update_parameters(model)
            for one in (model, averages[0].module, averages[1].module):
                assert all(bool(one.get_parameter(key)[zeros].eq(0).all()) for key, zeros in before.items())
            if scheduler is not None:
                scheduler.step()
    assert any(bool((parameter != dense.get_parameter(key)).any()) for key, parameter in model.named_parameters())
    step(model, optimizer, batches(model, 1)[0])
    assert sum(int(zeros.sum()) for zeros in zeros_of(model).values()) < sum(int(z.sum()) for z in before.values())


def test_removed_weights_have_no_gradient_and_others_may_become_zero(vit: nn.Module) -> None:
    result = vitprune.prune(vit, "magnitude", sparsity=0.5)
    optimizer, images, labels = torch.optim.SGD(result.model.parameters(), 0.1), *batches(vit, 1)[0]
    with torch.no_grad():
        result.model.blocks[0].mlp.fc1.weight.zero_()
    with vitprune.freeze_zeros(torch.compile(result.model, backend="eager"), optimizer, masks=result.masks):
        nn.functional.cross_entropy(result.model(images), labels).backward()
        for name, mask in result.masks.items():
            assert not bool(result.model.get_parameter(name).grad[~mask].any())
        optimizer.step()
    fc1 = result.model.blocks[0].mlp.fc1.weight
    assert torch.equal(fc1 != 0, result.masks["blocks.0.mlp.fc1.weight"])


def test_invalid_arguments_are_refused(vit: nn.Module) -> None:
    optimizer = torch.optim.SGD(vit.parameters(), 0.1)
    for given, options, message in (
        ((vit,), {}, r"^freeze_zeros: give the model and every optimizer"),
        ((vit, "sgd"), {}, r"^freeze_zeros: give the model and every optimizer"),
        ((vit, optimizer), {"masks": {}}, r"^masks: blocks.0.attn.qkv.weight has no mask of shape \[144, 48\]"),
    ):
        with pytest.raises(BadInput, match=message), vitprune.freeze_zeros(*given, **options):
            pass
