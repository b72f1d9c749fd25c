"""Models as users have them: half precision, inference mode, autocast, checkpointing, other norms and blocks."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import vitprune
from tests.support.model_zoo import VIT, batches, images, predict, redrawn, same_state, state, tiny
from vitprune import BadInput, ParamSlice, PruneConfig, TrainConfig
from vitprune.evaluation.check_model import check

METHODS = ["channel-taylor", "upvits", "unit-obs"]
BLOCKS = ("vit_giant_patch14_reg4_dinov2", "aimv2_large_patch14_224", "vit_base_patch16_rpn_224")
SHAPE = {"img_size": 28, "patch_size": 14, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}


@pytest.mark.parametrize(
    ("method", "dtype"),
    [("channel-taylor", torch.float16), ("obc", torch.bfloat16), ("unit-obs", torch.bfloat16)],
)
def test_half_precision_is_pruned_in_float32(method: str, dtype: torch.dtype) -> None:
    half, given = tiny("vit", dtype=dtype), [(x.float(), y) for x, y in batches(tiny("vit"))]
    result = vitprune.prune(half, method, sparsity=0.25, calibration=given)
    assert {parameter.dtype for parameter in (*result.model.parameters(), *half.parameters())} == {dtype}
    single = vitprune.prune(tiny("vit", dtype=dtype).float(), method, sparsity=0.25, calibration=given)
    assert same_state(result.model, state(single.model.to(dtype)))


MODES: dict[str, Callable[[], AbstractContextManager]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", METHODS)
def test_modes_of_the_caller_have_no_effect(mode: str, method: str, vit: nn.Module) -> None:
    expected = vitprune.prune(vit, method, sparsity=0.25, calibration=batches(vit)).model
    with MODES[mode]():
        model = tiny("vit")  # in inference mode, its weights are inference tensors
        result = vitprune.prune(model, method, sparsity=0.25, calibration=batches(model)).model
        scores = vitprune.score(model, vitprune.find_groups(model, ["ffn"]), "taylor", batches(model))
    assert same_state(result, state(expected))
    assert len(scores) == 2


@pytest.mark.parametrize("method", ["ovit", "obc", "unit-obs"])
def test_activation_checkpointing_is_off_for_scores_and_restored(method: str, vit: nn.Module) -> None:
    expected = vitprune.prune(vit, method, sparsity=0.25, calibration=batches(vit)).model
    vit.set_grad_checkpointing(True)
    result = vitprune.prune(vit, method, sparsity=0.25, calibration=batches(vit)).model
    assert same_state(result, state(expected))
    assert vit.grad_checkpointing is result.grad_checkpointing is True


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_other_norms_are_cut_with_the_residual_stream(norm: str) -> None:
    model = redrawn(timm.create_model("vit_tiny_patch16_224", **VIT, norm_layer=norm), 0)
    pruned = vitprune.prune(model, "channel-magnitude", sparsity={"residual": 0.25}).model
    assert pruned.blocks[0].norm1.normalized_shape == (36,)
    assert predict(pruned, images(model)).shape == (3, 7)


def test_a_module_that_needs_its_width_is_left_out(vit: nn.Module) -> None:
    vit.blocks[0].mlp.act = nn.Sequential(nn.GELU(), nn.Unflatten(-1, (48, 4)), nn.Flatten(-2))
    result = vitprune.prune(vit, "channel-magnitude", sparsity={"ffn": 0.25})
    assert list(result.masks) == ["blocks.1.mlp"]
    assert result.skipped["blocks.0.mlp"].startswith("blocks.0.mlp (Mlp): ")


@pytest.mark.parametrize("name", BLOCKS)
def test_vision_transformers_with_other_blocks_are_pruned(name: str) -> None:
    kinds = ["weight", "ffn", "head", "attention", "block"]
    results = list(check(name, kinds, [0.5], SHAPE))
    assert {result.kind: result.verdict for result in results} == dict.fromkeys(kinds, "proven")


def test_weights_and_units_of_parallel_blocks_are_pruned() -> None:
    results = list(check("vit_small_patch16_18x2_224", ["weight", "ffn", "head"], [0.5], SHAPE))
    assert {result.verdict for result in results} == {"proven"}


def test_gradual_pruning_of_a_compiled_model_in_half_precision() -> None:
    model = torch.compile(tiny("vit", dtype=torch.bfloat16), backend="eager")
    loader = [(x.float(), y) for x, y in batches(tiny("vit"), 2, 4)]
    config = PruneConfig(method="magnitude", sparsity=0.5, cycles=2, finetune=TrainConfig(epochs=1, lr=0.001))
    result = vitprune.gradual_prune(model, config, loader)
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.bfloat16}
    assert result.sparsity == {"weight": 0.5}


def test_settings_and_inputs_of_other_types_are_refused(vit: nn.Module) -> None:
    recipe = TrainConfig(epochs=1, lr=0.001)
    x, y = batches(vit, 1)[0]
    three = tiny("vit")
    three.reset_classifier(3)
    narrow = vitprune.find_groups(vitprune.prune(vit, "channel-magnitude", sparsity=0.5).model, ["ffn"])
    others = [replace(narrow[0], slices=(ParamSlice("blocks.0.mlp.fc1.weight.x", 0),))]
    for call, message in (
        (lambda: vitprune.find_groups(vit, "ffn"), r"^kinds: 'ffn' is a string; give a list, as in \['ffn'\]"),
        (lambda: vitprune.count(vit, (1, 3, 32, 32)), r"^example_input: is a tuple; give a tensor of images"),
        (lambda: vitprune.count(vit, x[0]), r"^example_input: has shape \(3, 32, 32\); give images"),
        (lambda: vitprune.latency(vit, x, 3), r"^models: is a VisionTransformer; give a list of models"),
        (lambda: vitprune.latency([vit], x[0], 3), r"^example_input: has shape \(3, 32, 32\)"),
        (lambda: list(check("vit_tiny_patch16_224", "ffn")), r"^kinds: 'ffn' is a string; give a list, as in"),
        (lambda: vitprune.finetune(vit, [(x, y)], {"epochs": 1}), r"^config: is a dict; give a TrainConfig"),
        (lambda: vitprune.finetune(vit, [(x, y + 7)], recipe), r"^loader\[0\]: label 7 is not a class"),
        (lambda: vitprune.finetune(vit, [(x.byte(), y)], recipe), r"^loader\[0\]: images are torch.uint8"),
        (lambda: vitprune.finetune(vit, [(x, y)], recipe, "dense"), r"^teacher: is a str; give a model of timm"),
        (lambda: vitprune.evaluate(vit, [(x, y - 100)]), r"^labels: -100 is not a class"),
        (lambda: vitprune.accuracy(vit, [x]), r"^batches\[0\]: is a Tensor; give pairs"),
        (lambda: vitprune.prune(vit, "magnitude", sparsity=0.5, example_input=3), r"^example_input: is a int"),
        (lambda: vitprune.prune(vit, "magnitude", sparsity=0.5, config={}), r"^config: is a dict; give a ScoreConfig"),
        (lambda: vitprune.prune(vit, "random", sparsity=0.5, seed="a"), r"^seed: is a str; give an integer"),
        (lambda: vitprune.prune(vit, "random", sparsity=0.5, seed=2**70), r"^seed: is 1180591620717411303424; give an"),
        (lambda: vitprune.finetune(vit, [(x, y)], recipe, seed=-1), r"^seed: is -1; give an integer from 0 to"),
        (lambda: vitprune.score(vit, [], "random", seed=1.5), r"^seed: is a float; give an integer"),
        (lambda: vitprune.score(vit, "ffn", "magnitude"), r"^groups: is a str; give a list of groups of find_groups"),
        (lambda: vitprune.score(vit, others, "magnitude"), r"^blocks.0.mlp: the model has no blocks.0.mlp.fc1.weight"),
        (lambda: vitprune.score(vit, narrow, "taylor", [(x, y)]), r"the group is out of date; call find_groups again"),
        (
            lambda: vitprune.save(tiny("vit"), __file__),
            r"cannot be made a directory \(File exists\); give another path",
        ),
        (lambda: vitprune.save(tiny("vit"), ""), r"^directory: '' is not a path"),
        (lambda: vitprune.load("a\0b"), r"^directory: 'a\\x00b' is not a path"),
        (lambda: vitprune.save(tiny("vit"), "x" * 300), r"cannot be made a directory \(File name too long\)"),
        (lambda: vitprune.find_groups(vit, None), r"^kinds: is a NoneType; give a list"),
        (lambda: vitprune.prune(vit, None, sparsity=0.5), r"^method: is a NoneType; give one of random, "),
        (lambda: vitprune.prune(vit, ["magnitude"], sparsity=0.5), r"^method: is a list; give one of"),
        (lambda: vitprune.score(vit, vitprune.find_groups(vit, ["ffn"]), 3), r"^criterion: is a int; give a name"),
        (
            lambda: vitprune.score(vit, vitprune.find_groups(vit, ["ffn"]), lambda *words: {}),
            r"^criterion: returned a dict; it must return an Importance",
        ),
        (lambda: vitprune.select([1], 0.5), r"^scores: is a list; give a mapping of names to tensors"),
        (lambda: vitprune.select({}, "half"), r"^sparsity: is a str; give a number"),
        (lambda: vitprune.latency([vit], x, 2.5), r"^runs: is a float; give an integer"),
        (lambda: vitprune.evaluate(vit, [(x, torch.eye(7)[y].double())]), r"^labels: are probabilities; give class"),
        (lambda: vitprune.finetune(vit, [(x, y * 0 - 100)], recipe), r"^loader\[0\]: no image has a label \(all are"),
        (lambda: vitprune.gradual_prune(vit, None, [(x, y)]), r"^config: is a NoneType; give a PruneConfig"),
        (
            lambda: vitprune.prune(vit, "channel-magnitude", sparsity={"ffn": 0.5}, round_to=1024),
            r"^prune.round_to 1024: the largest group of kind ffn has 192 units",
        ),
        (lambda: vitprune.load(None), r"^directory: is a NoneType; give a path"),
        (lambda: vitprune.export_onnx(vit, Path(__file__, "below"), x.float()), r"cannot be made a directory \("),
        (
            lambda: vitprune.finetune(tiny("vit"), [(x, y)], recipe, teacher=three),
            r"^teacher: has 3 classes, the model has \d+; give the dense model",
        ),
        (lambda: vitprune.prune(vit, "magnitude", sparsity="half"), r"^prune.sparsity"),
        (
            lambda: vitprune.prune(vit, "channel-taylor", kinds="ffn", sparsity=0.5),
            r"^kinds: 'ffn' is a string; give a list, as in",
        ),
    ):
        with pytest.raises(BadInput, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_images_and_models_in_other_types_are_converted() -> None:
    vit, half = tiny("vit", dtype=torch.float32), tiny("vit", dtype=torch.bfloat16)
    given = [(x.float(), y) for x, y in batches(vit, 2, 4)]
    assert vitprune.count(half, given[0][0]) == vitprune.count(vit, given[0][0])
    assert vitprune.evaluate(half, given)["params"] == vitprune.evaluate(vit, given)["params"]
    vitprune.finetune(half, given, TrainConfig(epochs=1, lr=0.001))


class Block(nn.Module):
    """A block without norms whose activations, scales and residual sums are computed in place, or not."""

    def __init__(self, in_place: bool):
        super().__init__()
        self.in_place, self.num_heads, self.head_dim = in_place, 2, 8
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.ReLU(inplace=in_place), nn.Linear(32, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = (self.num_heads, self.head_dim)
        q, k, v = (layer(x).unflatten(2, heads).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scale = self.head_dim**-0.5
        q = q.mul_(scale) if self.in_place else q * scale
        mixed = self.out(((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).flatten(2))
        x = mixed.add_(x) if self.in_place else x + mixed
        return self.mlp(x).add_(x) if self.in_place else x + self.mlp(x)


class Blocks(nn.Module):
    """A classifier of two such blocks."""

    def __init__(self, in_place: bool):
        super().__init__()
        self.image_size = 16
        self.patches, self.norm = nn.Conv2d(3, 16, 4, 4), nn.LayerNorm(16)
        self.blocks, self.head = nn.Sequential(Block(in_place), Block(in_place)), nn.Linear(16, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.norm(self.patches(images).flatten(2).transpose(1, 2))
        return self.head(self.blocks(tokens).mean(1))


@pytest.mark.parametrize("method", ["unit-obs", "upvits-fisher", "corp", "obc", "ovit", "fastcap", "channel-taylor"])
def test_operations_in_place_do_not_change_scores_and_updates(method: str) -> None:
    generator, states = torch.Generator().manual_seed(0), []
    data = [(torch.randn(6, 3, 16, 16, generator=generator).double(), torch.arange(6) % 5) for _ in range(3)]
    for in_place in (False, True):
        model = redrawn(Blocks(in_place), 1).double()
        states.append(state(vitprune.prune(model, method, sparsity=0.5, calibration=data).model))
    assert list(states[0]) == list(states[1])
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-9, atol=1e-12)


def test_a_forward_pass_without_gradients_is_refused() -> None:
    class Overwriting(Blocks):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            tokens = self.patches(images).flatten(2).transpose(1, 2)
            hidden = self.norm(tokens)
            tokens.add_(self.blocks(hidden))  # the norm needs its input
            return self.head(tokens.mean(1))

    data = [torch.randn(2, 3, 16, 16)]
    with pytest.raises(BadInput, match=r"^Overwriting: its gradients cannot be computed \(one of the variables needed"):
        vitprune.prune(Overwriting(False), "unit-obs", sparsity=0.5, calibration=data)
    assert (
        vitprune.prune(Overwriting(False), "channel-magnitude", sparsity=0.5, calibration=data).sparsity["ffn"] == 0.5
    )
