"""Importance of the directions of the residual stream, the basis made of them, and the refit of the readers."""

import copy

import pytest
import torch
from torch import nn

from tests.support.model_zoo import batches, images, predict, tiny
from tests.support.plans import context
from vitprune import BadInput, find_groups
from vitprune.architectures.stream_rotation import rotate_stream
from vitprune.criteria import DEFAULT_CONTEXT
from vitprune.criteria.obs.stream import importance_matrix, rotated, stream_basis
from vitprune.criteria.obs.units import unit_obs
from vitprune.groups import shrink

NORMS = ("blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1", "blocks.1.norm2", "norm")


def root(matrix: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T


def literal_importance(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Importance from one backward pass per image and class."""
    outputs: dict[str, torch.Tensor] = {}
    for path in NORMS:
        model.get_submodule(path).register_forward_hook(lambda _m, _i, out, path=path: outputs.update({path: out}))
    metric = {path: torch.zeros(48, 48).double() for path in NORMS}
    rows: dict[str, list[torch.Tensor]] = {path: [] for path in NORMS}
    for image in inputs:
        logits = model(image[None])[0]
        p = logits.detach().softmax(0)
        for c in range(len(p)):
            direction = p[c].sqrt() * (nn.functional.one_hot(torch.tensor(c), len(p)) - p)
            grads = torch.autograd.grad(logits @ direction, [outputs[path] for path in NORMS], retain_graph=True)
            for path, (grad,) in zip(NORMS, grads, strict=True):
                metric[path] += grad.T @ grad
        last = ("norm", "blocks.1.norm2")  # only their class tokens reach the classifier
        for path in NORMS:
            rows[path].append(outputs[path][0, :1] if path in last else outputs[path][0])
    total = torch.zeros(48, 48).double()
    for path in NORMS:
        values = torch.cat(rows[path]).detach()
        moment = values.T @ values * 48 / values.square().sum()
        full = metric[path] / len(inputs) + metric[path].trace() / len(inputs) / 48 * torch.eye(48)
        total += root(moment) @ full @ root(moment) / 2
    return total


def test_importance_equals_its_definition() -> None:
    model = rotate_stream(tiny("vit"), torch.eye(48))
    given = batches(model, 2, 3)
    expected = literal_importance(copy.deepcopy(model), torch.cat([part for part, _ in given]))
    torch.testing.assert_close(importance_matrix(model, given, DEFAULT_CONTEXT), expected, rtol=1e-7, atol=1e-8)
    small = importance_matrix(model, given, context(memory=1))
    torch.testing.assert_close(small, expected, rtol=1e-7, atol=1e-8)


def test_scores_of_a_rotated_stream_decrease_with_the_channel_index() -> None:
    model = tiny("distilled")
    given = batches(model, 2, 4)
    basis = stream_basis(model, given, DEFAULT_CONTEXT)
    torch.testing.assert_close(basis @ basis.T, torch.eye(48).double(), rtol=0, atol=1e-12)
    turned = rotated(model, basis, given[0][0][:1])
    scores = unit_obs(turned, find_groups(turned, ["residual"]), given, DEFAULT_CONTEXT).scores["residual"]
    assert bool((scores.diff() <= 1e-12).all())
    assert scores[-1].abs() < 1e-12  # LayerNorm ignores the mean of all channels
    torch.testing.assert_close(basis[:, -1].abs(), torch.full((48,), 48**-0.5).double(), rtol=0, atol=1e-6)


def test_directions_that_are_always_zero_are_removed_without_error() -> None:
    model = tiny("extra")
    (group,) = find_groups(model, ["residual"])
    silent = torch.arange(48) % 6 == 0
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for part in group.slices:
            if not (part.param.endswith("weight") and part.axis == 1) and "norm" not in part.param:
                parameters[part.param].index_fill_(part.axis, silent.nonzero().flatten(), 0)
    given, inputs = batches(model, 4, 6), images(model)
    expected = predict(model, inputs)
    turned = rotated(model, stream_basis(model, given, DEFAULT_CONTEXT), given[0][0][:1])
    groups = find_groups(turned, ["residual"])
    importance = unit_obs(turned, groups, given, DEFAULT_CONTEXT)
    assert int((importance.scores["residual"] < 1e-12).sum()) == 8
    masks = {"residual": importance.scores["residual"] >= 1e-12}
    with torch.no_grad():
        for name, value in importance.update(masks).items():
            turned.get_parameter(name).copy_(value)
    torch.testing.assert_close(predict(shrink(turned, groups, masks), inputs), expected, rtol=0, atol=1e-3)


def test_readers_are_refitted_after_the_basis_of_attentions_has_changed() -> None:
    model = tiny("vit")
    given = batches(model, 4, 6)
    turned = rotated(model, stream_basis(model, given, DEFAULT_CONTEXT), given[0][0][:1])
    groups = find_groups(turned, ["residual", "ffn", "attention"])
    importance = unit_obs(turned, groups, given, DEFAULT_CONTEXT)
    masks = {group.name: torch.ones(group.shape, dtype=torch.bool) for group in groups}
    masks |= {group.name: torch.arange(16).expand(3, 16) < 12 for group in groups if group.kind == "attention"}
    without = importance.update(masks)
    masks["residual"] = torch.arange(48) < 47  # the direction of importance zero
    both = importance.update(masks)
    for name in ("blocks.0.attn.qkv", "blocks.1.attn.qkv"):
        scaled = both[f"{name}.weight"][:, :47] * (47 / 48) ** 0.5
        torch.testing.assert_close(scaled, without[f"{name}.weight"][:, :47], rtol=0, atol=2e-3)
        torch.testing.assert_close(both[f"{name}.bias"], without[f"{name}.bias"], rtol=0, atol=2e-3)


def test_a_model_that_is_not_rotated_and_missing_images_are_refused() -> None:
    model = tiny("vit")
    with pytest.raises(BadInput, match="needs a rotated stream"):
        unit_obs(model, find_groups(model, ["residual"]), batches(model), DEFAULT_CONTEXT)
    with pytest.raises(BadInput, match="rotate_residual: needs images"):
        stream_basis(model, [], DEFAULT_CONTEXT)
