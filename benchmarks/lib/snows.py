"""SNOWS (Lucas & Mazumder, ICLR 2025) for timm's vision transformers: fit the remaining weights, layer by layer.

The loss of a layer is the sum of the mean squared errors at its output and at those of the next three linear layers,
relative to the dense model. One Newton step per layer: conjugate gradients with exact Hessian-vector products (second
derivatives), the mask as a projection, damping 1e-4, then backtracking with Armijo's condition on images that are not
fitted. The layers are fitted in their order, on the inputs that the layers before them give.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

WINDOW, DAMPING, TOLERANCE, ITERATIONS = 3, 1e-4, 5e-4, 200
SHRINK, STEPS, ARMIJO = 0.9, 50, 1e-5

State = tuple[Tensor, Tensor]  # residual stream (B, T, D), and the branch's value before the layer
Layer = tuple[nn.Linear, Callable[[State, Tensor], tuple[State, Tensor]]]


def fit_by_snows(model: nn.Module, dense: nn.Module, fit: Tensor, other: Tensor, seconds: float) -> list[int]:
    """Fit every pruned linear layer of the blocks in place.

    Args:
        model: A timm VisionTransformer whose linear layers contain zeros, which remain zero.
        dense: The dense model.
        fit: Images that are fitted (B, 3, H, W).
        other: Images of the backtracking.
        seconds: Time limit, divided equally among the layers that remain; fewer iterations fit into less time.

    Returns:
        Number of iterations of each layer.
    """
    deadline, iterations = time.perf_counter() + seconds, []
    ours, theirs = linear_layers(model), linear_layers(dense)
    states = [(embedded(model, images), torch.empty(0)) for images in (fit, other)]
    dense_states = [(embedded(dense, images), torch.empty(0)) for images in (fit, other)]
    for number, (layer, run) in enumerate(ours):
        with torch.no_grad():
            targets = [outputs(theirs[number : number + WINDOW + 1], state) for state in dense_states]
            dense_states = [theirs[number][1](state, theirs[number][0].weight)[0] for state in dense_states]
        window = ours[number : number + WINDOW + 1]
        losses = [Loss(window, state, target) for state, target in zip(states, targets, strict=True)]
        limit = time.perf_counter() + (deadline - time.perf_counter()) / (len(ours) - number)
        weight, count = newton_step(layer.weight.detach(), losses[0], losses[1], limit)
        iterations.append(count)
        with torch.no_grad():
            layer.weight.copy_(weight)
            states = [run(state, weight)[0] for state in states]
    return iterations


def newton_step(weight: Tensor, fitted: "Loss", other: "Loss", limit: float) -> tuple[Tensor, int]:
    """Return the weights after one step and the number of iterations."""
    mask = weight != 0
    start = weight.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(fitted(start), start, create_graph=True)
    residual = -gradient.detach() * mask
    slope, step, count = residual.clone(), torch.zeros_like(weight), 0
    norm = residual.square().sum()
    while count < ITERATIONS and norm.sqrt() > TOLERANCE and (count == 0 or time.perf_counter() < limit):
        (product,) = torch.autograd.grad(gradient, start, slope, retain_graph=True)
        product = product * mask + DAMPING * slope
        curvature, count = (slope * product).sum(), count + 1
        if curvature <= 0:  # not convex in this direction; the first one is the gradient's
            step = slope if count == 1 else step
            break
        step += norm / curvature * slope
        residual -= norm / curvature * product
        previous, norm = norm, residual.square().sum()
        slope = residual + norm / previous * slope
    with torch.no_grad():
        before, decrease = other(weight), float((gradient * step).sum())
        for power in range(STEPS + 1):
            moved = weight + SHRINK**power * step
            if other(moved) <= before + ARMIJO * SHRINK**power * decrease:
                return moved, count
    return weight, count


class Loss:
    """Sum of the mean squared errors of a window of layers, as a function of the first layer's weight."""

    def __init__(self, window: Sequence[Layer], state: State, targets: Sequence[Tensor]) -> None:
        self._window, self._state, self._targets = window, state, targets

    def __call__(self, weight: Tensor) -> Tensor:
        """Return the loss of the window if its first layer has these weights."""
        pairs = zip(outputs(self._window, self._state, weight), self._targets, strict=True)
        return torch.stack([(output - target).square().mean() for output, target in pairs]).sum()


def outputs(window: Sequence[Layer], state: State, weight: Tensor | None = None) -> list[Tensor]:
    """Return the outputs of the layers of a window; the first one's weight may be given."""
    results = []
    for number, (layer, run) in enumerate(window):
        own = layer.weight.detach()
        state, output = run(state, own if number or weight is None else weight)
        results.append(output)
    return results


def embedded(model: Any, images: Tensor) -> Tensor:
    """Return the input of the first block."""
    with torch.no_grad():
        return cast("Tensor", model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images)))))


def linear_layers(model: Any) -> list[Layer]:
    """Return the four linear layers of every block, each with the function from the state before it to that behind."""
    layers: list[Layer] = []
    for block in model.blocks:
        attention, mlp = block.attn, block.mlp
        layers += [
            (attention.qkv, lambda state, weight, block=block: _qkv(block, state, weight)),
            (attention.proj, lambda state, weight, block=block: _proj(block, state, weight)),
            (mlp.fc1, lambda state, weight, block=block: _fc1(block, state, weight)),
            (mlp.fc2, lambda state, weight, block=block: _fc2(block, state, weight)),
        ]
    return layers


def _qkv(block: Any, state: State, weight: Tensor) -> tuple[State, Tensor]:
    value = nn.functional.linear(block.norm1(state[0]), weight, block.attn.qkv.bias)
    return (state[0], value), value


def _proj(block: Any, state: State, weight: Tensor) -> tuple[State, Tensor]:
    heads = state[1].unflatten(2, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)  # q, k and v: (B, H, T, d)
    q, k, v = heads.unbind(0)
    attention = (q @ k.mT * block.attn.scale).softmax(-1)  # not fused: it has second derivatives
    mixed = (attention @ v).transpose(1, 2).flatten(2)
    value = block.ls1(nn.functional.linear(mixed, weight, block.attn.proj.bias))
    return (state[0] + value, value), value


def _fc1(block: Any, state: State, weight: Tensor) -> tuple[State, Tensor]:
    value = nn.functional.linear(block.norm2(state[0]), weight, block.mlp.fc1.bias)
    return (state[0], value), value


def _fc2(block: Any, state: State, weight: Tensor) -> tuple[State, Tensor]:
    value = block.ls2(nn.functional.linear(block.mlp.act(state[1]), weight, block.mlp.fc2.bias))
    return (state[0] + value, value), value
