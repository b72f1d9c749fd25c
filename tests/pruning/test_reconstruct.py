"""Reconstruction towards the dense model: selection by held-out images, preserved zeros, bit-identical results."""

import copy
import time

import pytest
import torch
from torch import Tensor, nn

from tests.support.model_zoo import batches, images, predict, state, tiny
from tests.support.plans import plan_for
from vitprune import BadInput, ReconstructConfig, ScoreConfig, find_groups, prune
from vitprune.errors import NotFinite
from vitprune.pruning.prune_cycles import prune_cycles
from vitprune.pruning.reconstruct import Reconstruction, _loss, reconstruct

FEW = ReconstructConfig(passes=3, lr=1e-3, batch_size=4, holdout=5)
LONGER = FEW.model_copy(update={"passes": 10})  # the rate rises over ten steps, which are two passes and a half


def half(name: str) -> tuple[nn.Module, nn.Module, list[tuple[Tensor, Tensor]]]:
    """Return a model, half of whose weights are zero in a copy, and batches."""
    model = tiny(name, dtype=torch.float32)
    data = batches(model, 3, 6)
    return model, prune(model, "magnitude", sparsity=0.5).model, data


@pytest.mark.parametrize("name", ["vit", "swin", "pvt"])
def test_held_out_divergence_decreases_and_zeros_remain(name: str) -> None:
    dense, pruned, data = half(name)
    zeros = {group.name: pruned.get_parameter(group.name) == 0 for group in find_groups(pruned, ["weight"])}
    before = copy.deepcopy(state(dense))
    result = reconstruct(pruned, dense, data, FEW)
    assert result.facts["nats_after"] < result.facts["nats_before"]
    assert len(result.curve) == 3
    assert result.facts["nats_after"] == min(row["held_out_nats"] for row in result.curve)
    for group, mask in zeros.items():
        assert torch.equal(pruned.get_parameter(group) == 0, mask)
    assert all(torch.equal(value, state(dense)[key]) for key, value in before.items())
    assert not pruned.training


def test_the_dense_model_runs_once_per_image_and_mirror_image(monkeypatch: pytest.MonkeyPatch) -> None:
    config = FEW.model_copy(update={"passes": 12})
    losses, calls = [], []
    for size in (1 << 30, 0):
        dense, pruned, data = half("swin")
        seen: list[int] = []
        hook = dense.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(len(args[0])))
        monkeypatch.setattr("vitprune.pruning.reconstruct.TARGET_BYTES", size)
        losses.append([row["loss"] for row in reconstruct(pruned, dense, data, config).curve])
        calls.append(sum(seen))
        hook.remove()
    fit, held, first = 15, 3, FEW.batch_size  # the first batch determines whether the outputs can be stored
    assert calls[0] <= held + first + 2 * fit
    assert calls[1] == held + 12 * fit
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_kept_pass_has_the_reported_divergence() -> None:
    dense, pruned, data = half("vit")
    result = reconstruct(pruned, dense, data, FEW)
    held = torch.cat([part for part, _ in data])[4::5]
    log_p, log_q = (predict(model, held).double().log_softmax(dim=1) for model in (dense, pruned))
    nats = float((log_p.exp() * (log_p - log_q)).sum()) / len(held)
    assert nats == pytest.approx(result.facts["nats_after"], rel=1e-5)


def test_a_model_that_cannot_improve_is_not_changed() -> None:
    dense, pruned, data = half("vit")
    before = copy.deepcopy(state(pruned))
    result = reconstruct(pruned, dense, data, ReconstructConfig(passes=1, lr=10.0, batch_size=4))
    assert result.facts == {
        "nats_before": result.facts["nats_before"],
        "nats_after": result.facts["nats_before"],
        "pass": 0,
        "passes": 1,
    }
    assert all(torch.equal(value, state(pruned)[key]) for key, value in before.items())


def test_the_same_seed_gives_bit_identical_weights_and_the_random_state_is_restored() -> None:
    dense, pruned, data = half("vit")
    other, third = copy.deepcopy(pruned), copy.deepcopy(pruned)
    torch.manual_seed(5)
    random = torch.get_rng_state()
    for model, seed in ((pruned, 0), (other, 0), (third, 1)):
        reconstruct(model, dense, data, FEW, seed)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state(other)[key]) for key, value in state(pruned).items())
    assert any(not torch.equal(value, state(third)[key]) for key, value in state(pruned).items())


@pytest.mark.parametrize("name", ["vit", "swin", "pvt"])
def test_classifier_and_embeddings_are_not_changed(name: str) -> None:
    dense, pruned, data = half(name)
    before = copy.deepcopy(state(pruned))
    assert reconstruct(pruned, dense, data, FEW).facts["pass"] > 0
    equal = {key.split(".")[0] for key, value in state(pruned).items() if torch.equal(value, before[key])}
    assert {"head", "patch_embed"} <= equal
    stage = {"vit": "blocks", "swin": "layers", "pvt": "stages"}[name]
    changed = [key for key, value in state(pruned).items() if not torch.equal(value, before[key])]
    assert all(key.split(".")[0] in (stage, "norm") or "norm" in key for key in changed)
    assert all(key in changed for key, _ in pruned.named_parameters() if key.startswith(stage) and "weight" in key)
    assert all(parameter.grad is None for key, parameter in pruned.named_parameters() if key.startswith("head"))


@pytest.mark.parametrize("kinds", [["ffn", "attention"], ["residual"], ["block"]])
def test_smaller_models_are_reconstructed(kinds: list[str]) -> None:
    dense = tiny("vit", dtype=torch.float32)
    data = batches(dense, 3, 6)
    method = "upvits-blocks" if kinds == ["block"] else "upvits"
    result = prune(dense, method, sparsity=0.5, kinds=kinds, calibration=data, reconstruct=LONGER)
    plain = prune(dense, method, sparsity=0.5, kinds=kinds, calibration=data)
    seen = data[0][0]
    errors = [float((predict(model, seen) - predict(dense, seen)).norm()) for model in (result.model, plain.model)]
    assert errors[0] < errors[1]
    assert {k: v.shape for k, v in state(result.model).items()} == {k: v.shape for k, v in state(plain.model).items()}


def test_prune_reconstructs_after_every_cycle() -> None:
    model = tiny("vit", dtype=torch.float32)
    data = batches(model, 3, 6)
    result = prune(model, "n:m", calibration=data, reconstruct=FEW)
    assert result.reconstruction["nats_after"] < result.reconstruction["nats_before"]
    assert "held-out KL divergence" in str(result)
    assert not prune(model, "magnitude", sparsity=0.5).reconstruction
    for group in find_groups(result.model, ["weight"]):
        weight = result.model.get_parameter(group.name)
        assert bool(((weight.view(len(weight), -1, 4) != 0).sum(dim=2) <= 2).all())
    pruned = copy.deepcopy(model)
    cycles = list(prune_cycles(pruned, plan_for("magnitude", 0.6, cycles=2, reconstruct=FEW), data))
    assert len(cycles) == 2
    assert all(cycle.reconstruction.facts["nats_after"] < cycle.reconstruction.facts["nats_before"] for cycle in cycles)


def test_prune_in_cycles_equals_prune_cycles() -> None:
    model = tiny("vit", dtype=torch.float32)
    data, settings = batches(model, 3, 6), {"sparsity": {"ffn": 0.5}, "cycles": 3, "reconstruct": FEW}
    result = prune(model, "unit-obs", calibration=data, **settings)
    plan = plan_for("unit-obs", settings["sparsity"], cycles=3, reconstruct=FEW)
    expected = copy.deepcopy(model)
    cycles = list(prune_cycles(expected, plan, data))
    assert [round(cycle.target["ffn"], 4) for cycle in cycles] == [0.3519, 0.4815, 0.5]
    assert result.sparsity == {"ffn": 0.5}
    assert result.reconstruction == cycles[-1].reconstruction.facts
    assert all(torch.equal(value, state(expected)[name]) for name, value in state(result.model).items())


def test_a_budget_is_divided_among_the_cycles(monkeypatch: pytest.MonkeyPatch) -> None:
    deadlines = []

    def record(*arguments: object) -> Reconstruction:
        deadlines.append(arguments[-1])
        return Reconstruction()

    monkeypatch.setattr("vitprune.pruning.prune_cycles.reconstruct", record)
    model = tiny("vit")
    start = time.perf_counter()
    prune(model, "magnitude", sparsity=0.5, calibration=batches(model, 3, 6), reconstruct=True, cycles=4, budget="400s")
    assert [round((deadline - start) / 100, 1) for deadline in deadlines] == pytest.approx([1, 2, 3, 4], abs=0.3)


def test_streams_are_compared_in_the_order_of_permuted_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("vit", dtype=torch.float32)
    losses = []

    def recorded(*args: object) -> Tensor:
        losses.append(_loss(*args))
        return losses[-1]

    monkeypatch.setattr("vitprune.pruning.reconstruct._loss", recorded)
    for permuted in (False, True):
        config = ScoreConfig(permute=permuted)
        prune(model, "obc", scope="2:4", calibration=batches(model, 3, 6), reconstruct=FEW, config=config)
    first, half = float(losses[0].detach()), len(losses) // 2
    assert float(losses[half].detach()) < 1.5 * first


def test_input_that_cannot_be_used_is_refused() -> None:
    dense, pruned, data = half("vit")
    with pytest.raises(BadInput, match=r"^prune.reconstruct: 3 images; give at least 5, one is held out$"):
        reconstruct(pruned, dense, [(images(dense), torch.zeros(3).long())], FEW)
    with pytest.raises(BadInput, match=r"^prune.reconstruct: 0 images"):
        reconstruct(pruned, dense, [], FEW)
    with pytest.raises(
        BadInput, match=r"^prune.reconstruct.mirror: the inputs are not images .B, C, H, W.; set it to false$"
    ):
        reconstruct(pruned, dense, [(torch.zeros(9, 4).long(), torch.zeros(9))], FEW)
    broken = [(part * torch.inf, labels) for part, labels in data]
    with pytest.raises(NotFinite, match=r"^prune.reconstruct: the loss is not finite; lower lr or check the images$"):
        reconstruct(pruned, dense, broken, FEW)


def test_a_frozen_model_is_refused() -> None:
    model = tiny("vit").requires_grad_(False)
    with pytest.raises(BadInput, match=r"^prune.reconstruct: all parameters of the blocks are frozen; call requires_g"):
        prune(model, "unit-obs", sparsity=0.5, calibration=batches(model, 3, 4), reconstruct=True, budget="1min")
