"""CORP: ranking and affine prediction of removed units."""

import copy

import pytest
import torch

from tests.support.model_zoo import batches, predict, tiny
from vitprune import BadInput, find_groups, prune
from vitprune.criteria import DEFAULT_CONTEXT
from vitprune.criteria.corp import affine_prediction, corp
from vitprune.groups import zero


def test_an_affine_relation_is_recovered() -> None:
    generator = torch.Generator().manual_seed(0)
    kept = torch.randn((500, 3), generator=generator, dtype=torch.float64) * 30
    removed = kept @ torch.tensor([[1.0], [-2.0], [0.5]], dtype=torch.float64) + 7
    rows = torch.cat([kept[:, :1], removed, kept[:, 1:], torch.ones(500, 1, dtype=torch.float64)], dim=1)
    share, constant = affine_prediction(rows.T @ rows, torch.tensor([True, False, True, True]))
    torch.testing.assert_close(share, torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(constant, torch.tensor([7.0], dtype=torch.float64), rtol=1e-3, atol=1e-3)


def test_scores_are_energy_times_both_norms() -> None:
    model = tiny("vit")
    group = find_groups(model, ["ffn"])[0]
    block = model.get_submodule(group.slices[0].param.rsplit(".", 2)[0])
    seen = []
    handle = block.get_submodule("fc2").register_forward_hook(lambda module, given, output: seen.append(given[0]))
    for images, _ in batches(model):
        predict(model, images)
    handle.remove()
    result = corp(model, [group], batches(model), DEFAULT_CONTEXT).scores[group.name]
    energy = torch.cat([rows.flatten(0, 1) for rows in seen]).double().square().mean(dim=0)
    fc1, fc2 = (block.get_parameter(f"{layer}.weight").double() for layer in ("fc1", "fc2"))
    torch.testing.assert_close(result, energy * fc1.norm(dim=1) * fc2.norm(dim=0), rtol=1e-5, atol=0)


def test_the_update_reduces_the_logit_error() -> None:
    model = tiny("vit")
    importance = corp(model, find_groups(model, ["ffn"]), batches(model), DEFAULT_CONTEXT)
    masks = {name: score > score.median() for name, score in importance.scores.items()}
    groups = find_groups(model, ["ffn"])
    plain, updated = zero(copy.deepcopy(model), groups, masks), zero(copy.deepcopy(model), groups, masks)
    assert importance.update is not None
    for name, value in importance.update(masks).items():
        updated.get_parameter(name).data.copy_(value)
    zero(updated, groups, masks)
    seen = batches(model)[0][0]
    dense = predict(model, seen)
    assert (predict(updated, seen) - dense).norm() < 0.5 * (predict(plain, seen) - dense).norm()


def test_attention_is_refused() -> None:
    model = tiny("vit")
    with pytest.raises(BadInput, match=r"^prune.sparsity.attention: method corp prunes only ffn"):
        prune(model, "corp", sparsity={"attention": 0.5}, calibration=batches(model))
    with pytest.raises(BadInput, match=r"corp scores ffn, not kind 'attention'"):
        corp(model, find_groups(model, ["attention"]), batches(model), DEFAULT_CONTEXT)
