"""Adam in the principal directions of the inputs of every layer."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from vitprune.criteria import layer_io
from vitprune.evaluation.logits import logits_of
from vitprune.runtime.hooks import forward_hooks

EPS = 1e-8


class RotatedAdam:
    """Adam whose gradients of weights are rotated into a basis of the layer's inputs, and whose steps are rotated back.

    In a basis of principal directions the inputs are uncorrelated, so that one step size per entry is enough. Other
    parameters are trained by plain Adam.

    Args:
        parameters: The parameters.
        bases: Orthogonal matrix (inputs, inputs) of a parameter (outputs, ...), with directions as columns.
        betas: Decay rates of the mean of the gradients and of their squares.

    Source: SOAP (Vyas et al., ICLR 2025), one-sided; the basis is computed once, from the inputs instead of gradients.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], bases: Mapping[nn.Parameter, Tensor], betas: Sequence[float]
    ):
        self._parameters, self._bases, (self._beta1, self._beta2) = parameters, bases, betas
        self._means = [torch.zeros_like(self._rows(parameter)) for parameter in parameters]
        self._squares = [torch.zeros_like(mean) for mean in self._means]
        self._steps = 0

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Move all parameters that have a gradient, at a learning rate."""
        self._steps += 1
        unbiased = [1 - beta**self._steps for beta in (self._beta1, self._beta2)]
        for parameter, mean, square in zip(self._parameters, self._means, self._squares, strict=True):
            if parameter.grad is None:
                continue
            gradient, basis = self._rows(parameter.grad), self._bases.get(parameter)
            gradient = gradient if basis is None else gradient @ basis
            mean.lerp_(gradient, 1 - self._beta1)
            square.mul_(self._beta2).addcmul_(gradient, gradient, value=1 - self._beta2)
            step = mean / unbiased[0] / ((square / unbiased[1]).sqrt() + EPS)
            step = step if basis is None else step @ basis.T
            parameter.sub_(step.view_as(parameter), alpha=lr)
            parameter.grad = None

    @staticmethod
    def _rows(value: Tensor) -> Tensor:
        return value.detach().flatten(1) if value.ndim > 1 else value.detach()


def input_bases(
    model: nn.Module, parameters: Iterable[nn.Parameter], batches: Sequence[Tensor]
) -> dict[nn.Parameter, Tensor]:
    """Return the principal directions of the inputs of Linear layers and ungrouped convolutions, by weight.

    Args:
        model: The model.
        parameters: Weights of other layers are left out.
        batches: Inputs of the model.
    """
    wanted, moments = set(parameters), dict[nn.Parameter, Tensor]()

    def add(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        inputs = layer_io.layer_inputs(layer, args[0].detach(), len(args[0])).flatten(0, 1)
        weight = layer.weight
        assert isinstance(weight, nn.Parameter)
        moments[weight] = moments.get(weight, torch.zeros(())).to(inputs) + inputs.T @ inputs

    layers = [layer for layer in model.modules() if layer_io.is_plain_layer(layer) and layer.weight in wanted]
    with forward_hooks((layer, add) for layer in layers):
        logits_of(model, batches)
    return {weight: torch.linalg.eigh(moment.double())[1].to(weight.dtype) for weight, moment in moments.items()}
