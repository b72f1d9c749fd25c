"""Variants of CAP: N:M patterns, FastCAP, refused input."""

import pytest
import torch
from torch import nn

from tests.support.model_zoo import batches, images, tiny
from tests.support.plans import changed, context
from tests.support.reference_obs import SMALL, cost, fastcap_columns, image_gradients, matrices
from vitprune import BadInput, find_groups, prune
from vitprune.criteria import DEFAULT_CONTEXT
from vitprune.criteria.obs import cap
from vitprune.criteria.obs.fastcap import fastcap
from vitprune.criteria.obs.fisher_blocks import solve_jointly
from vitprune.criteria.obs.weight_blocks import split_into_blocks
from vitprune.groups import Group, ParamSlice
from vitprune.pruning.select import select


@pytest.mark.parametrize("method", ["ovit", "woodfisher", "magnitude-obs", "fastcap", "fisher-diagonal"])
def test_n_of_m_weights_of_each_row_are_kept(method: str) -> None:
    model = tiny("vit")
    data = batches(model)
    pruned = prune(model, method, calibration=data, example_input=images(model), scope="2:4").model
    for group in find_groups(pruned, ["weight"]):
        weight = pruned.get_parameter(group.name)
        assert bool(((weight.view(len(weight), -1, 4) == 0).sum(dim=2) == 2).all())


def test_n_of_m_elimination_has_less_loss_than_n_of_m_selection_afterwards(vit: nn.Module) -> None:
    groups, data = find_groups(vit, ["weight"])[2:3], batches(vit, 4)
    fisher = matrices(vit, data=data)[groups[0].name]
    weights = vit.get_parameter(groups[0].name).detach().view(-1, 24)
    costs = []
    for setting in (changed(SMALL, pattern=(2, 4)), SMALL):
        scores = cap.ovit(vit, groups, data, setting).scores
        keep = select(scores, 0.5, "2:4")[groups[0].name].view(-1, 24)
        costs.append(cost(fisher, weights, solve_jointly(fisher, weights, keep)))
    assert costs[0] < costs[1]


def test_fastcap_equals_the_published_algorithm(vit: nn.Module) -> None:
    groups, data = find_groups(vit, ["weight"])[1:2], batches(vit)
    name = groups[0].name
    result = fastcap(vit, groups, data, SMALL)
    grads = image_gradients(vit, name, data)
    fisher = sum(2 * g.view(-1, 24).T @ g.view(-1, 24) for g in grads) / len(grads)
    torch.testing.assert_close(result.statistics[f"{name}/fisher"], fisher, rtol=1e-9, atol=1e-15)
    masks = select(result.scores, 0.5, "layer")
    expected = fastcap_columns(fisher, vit.get_parameter(name).detach().view(-1, 24), 0.5, 1e-2)
    torch.testing.assert_close(result.update(masks)[name].view(-1, 24), expected, rtol=1e-8, atol=1e-12)
    assert torch.equal(masks[name].view(-1, 24), expected != 0)


def test_invalid_input_is_refused(vit: nn.Module) -> None:
    groups = find_groups(vit, ["weight"])
    with pytest.raises(BadInput, match=r"^Fisher blocks: need images with labels; give calibration batches$"):
        cap.ovit(vit, groups, [], DEFAULT_CONTEXT)
    with pytest.raises(BadInput, match=r"^blocks.0.mlp: unstructured criteria score kind 'weight', not 'ffn'$"):
        cap.ovit(vit, find_groups(vit, ["ffn"]), batches(vit), DEFAULT_CONTEXT)
    with pytest.raises(BadInput, match=r"^score.gradient_batch 128: there are only 6 images; lower it, give"):
        cap.ovit(vit, groups, batches(vit), context(per_sample=False))
    with pytest.raises(
        BadInput, match=r"^blocks.0.attn.qkv.weight: rows of 48 weights cannot be divided into runs of 5"
    ):
        cap.ovit(vit, groups, batches(vit), context(pattern=(2, 5)))
    with pytest.raises(BadInput, match=r"^score.damping: a Fisher block is not positive definite; raise it"):
        cap.ovit(vit, groups, batches(vit), context(damping=1e-30))
    with torch.no_grad():
        vit.blocks[1].mlp.fc2.weight[0, 0] = torch.nan
    with pytest.raises(BadInput, match=r"^blocks.1.mlp.fc2.weight: has values that are not finite"):
        prune(vit, "ovit", sparsity=0.5, calibration=batches(vit))


def test_non_contiguous_n_of_m_runs_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3))
    group = Group("0.weight", "weight", (4, 4, 3, 3), (ParamSlice("0.weight", None),))
    with pytest.raises(BadInput, match=r"^0.weight: its runs of 4 input channels are not contiguous \(kernel 3x3\)"):
        split_into_blocks(model, [group], 16, 4)
    assert split_into_blocks(model, [group], 16)[0].size == 16
