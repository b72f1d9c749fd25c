"""Adam in the principal directions of a layer's inputs: the literal algorithm, plain Adam without a basis, zeros."""

import torch
from torch import nn

from tests.support.model_zoo import batches, tiny
from vitprune.pruning.rotated_adam import EPS, RotatedAdam, input_bases
from vitprune.training.frozen_zeros import freeze_zeros

BETAS = (0.9, 0.99)


def parameters_with_gradients(steps: int) -> tuple[list[nn.Parameter], list[list[torch.Tensor]]]:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in ((3, 5), (4, 2, 2, 2), (6,))]
    return parameters, [[torch.randn_like(parameter) for parameter in parameters] for _ in range(steps)]


def test_without_a_basis_the_steps_equal_adam() -> None:
    ours, gradients = parameters_with_gradients(4)
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    optimizer, adam = RotatedAdam(ours, {}, BETAS), torch.optim.Adam(theirs, 0.02, BETAS, EPS)
    for step in gradients:
        for mine, other, gradient in zip(ours, theirs, step, strict=True):
            mine.grad, other.grad = gradient.clone(), gradient.clone()
        optimizer.step(0.02)
        adam.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


def test_with_a_basis_the_steps_equal_adam_of_the_rotated_weights() -> None:
    (weight, kernel, _), gradients = parameters_with_gradients(4)
    bases = {
        p: torch.linalg.qr(torch.randn(p[0].numel(), p[0].numel(), dtype=torch.float64))[0] for p in (weight, kernel)
    }
    rotated = [nn.Parameter(p.detach().flatten(1) @ bases[p]) for p in (weight, kernel)]
    optimizer, adam = RotatedAdam([weight, kernel], bases, BETAS), torch.optim.Adam(rotated, 0.02, BETAS, EPS)
    for step in gradients:
        for mine, other, gradient in zip((weight, kernel), rotated, step, strict=False):
            mine.grad, other.grad = gradient.clone(), gradient.flatten(1) @ bases[mine]
        optimizer.step(0.02)
        adam.step()
    for mine, other in zip((weight, kernel), rotated, strict=True):
        torch.testing.assert_close(mine.flatten(1), other @ bases[mine].T, rtol=1e-10, atol=1e-12)


def test_in_the_basis_of_a_layer_its_inputs_are_uncorrelated() -> None:
    model = tiny("pvt")
    images = [part for part, _ in batches(model, 2, 3)]
    inputs = dict[str, list[torch.Tensor]]()
    bases = input_bases(model, model.parameters(), images)
    layers = {"stages.0.blocks.0.mlp.fc1": nn.Linear, "stages.1.downsample.proj": nn.Conv2d}
    for path, kind in layers.items():
        layer = model.get_submodule(path)
        assert type(layer) is kind
        hook = layer.register_forward_hook(lambda _, args, out, path=path: inputs.setdefault(path, []).append(args[0]))
        with torch.no_grad():
            for part in images:
                model(part)
        hook.remove()
        read = torch.cat(inputs[path])
        if kind is nn.Conv2d:
            read = nn.functional.unfold(read, layer.kernel_size, 1, layer.padding, layer.stride).transpose(1, 2)
        projected = read.flatten(0, -2) @ bases[layer.weight]
        moments = projected.T @ projected
        off_diagonal = moments - torch.diag(moments.diagonal())
        assert float(off_diagonal.abs().max()) < 1e-8 * float(moments.diagonal().max())
    assert model.get_parameter("stages.0.blocks.0.mlp.dwconv.weight") not in bases


def test_weights_that_are_zero_remain_zero() -> None:
    model = tiny("vit")
    images = [part for part, _ in batches(model, 1, 3)]
    weight = model.get_parameter("blocks.0.mlp.fc1.weight")
    with torch.no_grad():
        weight[:, ::2] = 0
    parameters = list(model.parameters())
    optimizer = RotatedAdam(parameters, input_bases(model, parameters, images), BETAS)
    with freeze_zeros(model, optimizer):
        model(images[0]).square().sum().backward()
        optimizer.step(0.1)
    assert bool((weight[:, ::2] == 0).all())
    assert bool((weight[:, 1::2] != 0).all())
