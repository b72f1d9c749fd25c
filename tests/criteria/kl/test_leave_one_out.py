"""Leave-one-out KL scores against a reference ViT with masked units."""

import pytest
import torch

from tests.support.model_zoo import batches, images, tiny
from tests.support.reference_kl import kl, literal_vit
from vitprune import find_groups, score


@pytest.mark.parametrize("kind", ["ffn", "attention"])
def test_kl_equals_the_divergence_of_the_masked_reference(kind: str) -> None:
    vit = tiny("thin")
    group, data = find_groups(vit, [kind])[1], batches(vit)
    result = score(vit, [group], "kl-literal", data)[group.name]
    assert result.shape == group.shape
    inputs = torch.cat([b[0] for b in data])
    dense = literal_vit(vit, inputs, {})
    for unit in range(0, group.units, group.units // 4):
        keep = (torch.arange(group.units) != unit).view(group.shape)
        expected = kl(dense, literal_vit(vit, inputs, {group.name: keep}))
        assert float(result.flatten()[unit]) == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_kl_of_a_residual_channel_equals_the_kl_of_the_narrower_model() -> None:
    vit = tiny("thin")
    group, data = find_groups(vit, ["residual"])[0], batches(vit)
    result = score(vit, [group], "kl-literal", data)["residual"]
    inputs = torch.cat([b[0] for b in data])
    dense = literal_vit(vit, inputs, {})
    for unit in range(0, 48, 7):
        narrow = literal_vit(vit, inputs, {"residual": torch.arange(48) != unit})
        assert float(result[unit]) == pytest.approx(kl(dense, narrow), rel=1e-9)
        assert float(result[unit]) != pytest.approx(kl(narrow, dense), rel=1e-3)  # the reverse KL divergence differs


def test_kl_is_a_sum_over_images_independent_of_batching(vit: torch.nn.Module) -> None:
    groups = find_groups(vit, ["head"])
    data = [(images(vit, 4), torch.zeros(4).long())]
    apart = [(image[None], torch.zeros(1).long()) for image in data[0][0]]
    full, single = score(vit, groups, "kl-literal", data), score(vit, groups, "kl-literal", apart)
    each = [score(vit, groups, "kl-literal", [batch]) for batch in apart]
    for name, result in full.items():
        torch.testing.assert_close(result, single[name], rtol=1e-10, atol=1e-15)
        torch.testing.assert_close(result, sum(one[name] for one in each), rtol=1e-10, atol=1e-15)
        assert bool((result > 0).all())


def test_kl_of_a_unit_with_zero_output_weights_is_zero() -> None:
    vit = tiny("thin")
    with torch.no_grad():
        vit.blocks[1].mlp.fc2.weight[:, 11] = 0
    group = find_groups(vit, ["ffn"])[1]
    result = score(vit, [group], "kl-literal", batches(vit, 1))[group.name]
    assert (result == 0).nonzero().flatten().tolist() == [11]
