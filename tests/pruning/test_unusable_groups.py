"""`prune` with models of other libraries: groups that cannot be scored are left out and reported."""

import re
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import vitprune
from tests.architectures.test_traced_groups import SIZES
from tests.support.model_zoo import batches, redrawn, same_state, tiny
from tests.support.other_models import MODELS, make_model
from vitprune import BadInput, find_groups
from vitprune.architectures.narrow_attention import BY_HAND, call_output_projections, restore_classes
from vitprune.runtime.input_size import input_size
from vitprune.runtime.outputs import main_tensor

# by model: what is left out, with the reason
LEFT_OUT = {
    "siglip": {
        "head.attention": "do not come from plain Linear layers",
        "head.mlp": "it does not affect the output that counts",
    },
    "swinv2": {
        "attention": "whole heads are pruned instead",
        "encoder.layers.0.blocks.0.attention.self.continuous_position_bias_mlp": "its inputs are not those of images",
    },
    "dinov3": {"attention": "whole heads are pruned instead"},
    "sam": {"attention": "heads share its channels; whole heads are pruned instead"},
    "torchvision vit": {"attention": "whole heads are pruned instead"},
    "open_clip": {"attention": "whole heads are pruned instead"},
}


def calibration(name: str, model: nn.Module) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 3, *SIZES.get(name, input_size(model)[1:]), generator=generator)]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", [name for name in MODELS if name != "detr"])
def test_unit_obs_reaches_a_target_by_default(name: str) -> None:
    model = redrawn(make_model(name), 1) if name.startswith("torchvision") else make_model(name)
    images = calibration(name, model)
    result = vitprune.prune(model, "unit-obs", target={"macs": 0.85}, calibration=images)
    assert 0.7 < result.after.macs / result.before.macs <= 0.85
    for path, why in LEFT_OUT.get(name, {}).items():
        assert why in result.skipped[path]
    assert torch.isfinite(main_tensor(result.model(images[0]))).all()


def test_an_unreachable_target_names_the_modules_that_are_not_pruned() -> None:
    model = make_model("detr")
    with pytest.raises(BadInput, match=r"^prune.target: 0.5 of the dense model cannot be reached, the smallest is "):
        vitprune.prune(model, "unit-obs", target={"macs": 0.5}, calibration=calibration("detr", model))
    tied = make_model("vit")
    first, second = (dict(layer.named_modules()) for layer in tied.vit.layers)
    for name, layer in first.items():
        if isinstance(layer, nn.Linear) and name.startswith("attention"):
            second[name].weight = layer.weight
    with pytest.raises(BadInput, match=r"cannot be reached, .*; not pruned: attention: "):
        vitprune.prune(tied, "unit-obs", target={"macs": 0.4}, calibration=calibration("vit", tied))


def test_nothing_to_prune_is_refused() -> None:
    model = make_model("siglip")
    rule = re.escape("head.mlp: it does not affect the output that counts; it is not pruned")
    images = calibration("siglip", model)
    with pytest.raises(BadInput, match=f"^{rule}$"):
        vitprune.prune(Pooled(model), "unit-obs", sparsity={"ffn": 0.5}, calibration=images)


class Pooled(nn.Module):
    """A model of which only the pooling layer has hidden units, which the output does not use."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.patches, self.head = model.embeddings, model.head
        self.image_size = 64

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        tokens = self.patches(images)
        return {"last_hidden_state": tokens, "pooled": self.head(tokens)}


def test_default_kinds_of_a_timm_model_are_those_that_it_has() -> None:
    model = tiny("pvt")
    result = vitprune.prune(model, "unit-obs", sparsity=0.5, calibration=batches(model))
    assert result.skipped["attention"].endswith("so there is no change of basis; whole heads are pruned instead")
    assert "stages.2.blocks.0.attn.heads" in result.masks
    with pytest.raises(BadInput, match=r"^stages.0.blocks.0.attn: its q, k and v do not come from plain Linear layers"):
        vitprune.prune(model, "unit-obs", sparsity=0.5, kinds=["ffn", "attention"], calibration=batches(model))


@pytest.mark.parametrize("name", ["torchvision vit", "torchvision swin", "torchvision swin v2", "open_clip"])
def test_output_projections_are_called_and_the_classes_restored(name: str) -> None:
    model = redrawn(make_model(name), 1).double()
    images = calibration(name, model)[0].double()
    with torch.no_grad():
        expected = main_tensor(model(images))
        call_output_projections(model)
        called = set()
        for path, module in model.named_modules():
            if type(module) in BY_HAND.values():
                leaf = "out_proj" if hasattr(module, "out_proj") else "proj"
                output = module.get_submodule(leaf)
                output.register_forward_hook(lambda *_, path=path: called.add(path))
        torch.testing.assert_close(main_tensor(model(images)), expected, rtol=1e-9, atol=1e-9)
    assert len(called) >= 2
    restore_classes(model)
    assert not any(type(module) in BY_HAND.values() for module in model.modules())


@pytest.mark.parametrize("criterion", ["kl-fisher", "unit-obs", "fisher-diagonal", "fastcap", "ovit", "obc"])
def test_score_records_the_layers_of_torch_attention_as_prune_does(criterion: str) -> None:
    model = redrawn(make_model("torchvision vit"), 1)
    kinds = ["ffn", "head"] if criterion in ("kl-fisher", "unit-obs") else ["weight"]
    images = calibration("torchvision vit", model)[0]  # one batch
    pairs = [(images[:2], torch.tensor([0, 1]))]
    scores = vitprune.score(model, find_groups(model, kinds), criterion, pairs)
    assert all(bool(value.any()) for value in scores.values())
    assert not any(type(module) in BY_HAND.values() for module in model.modules())
    if criterion == "fisher-diagonal":
        assert vitprune.prune(model, criterion, sparsity=0.5, calibration=pairs).sparsity == {"weight": 0.5}


@pytest.mark.parametrize("name", ["torchvision vit", "open_clip", "siglip"])
def test_single_weights_of_torch_attention_are_pruned_except_the_fused_projection(name: str) -> None:
    model = redrawn(make_model(name), 1)
    result = vitprune.prune(model, "obc", scope="2:4", calibration=calibration(name, model))
    fused = [path for path, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    assert {f"{path}.in_proj_weight" for path in fused} <= set(result.skipped)
    assert type(result.model.get_submodule(fused[0])) is nn.MultiheadAttention
    weights = [name for name in result.masks if name.endswith("out_proj.weight")]
    assert len(weights) >= 2
    for weight in weights:
        zeros = (result.model.get_parameter(weight) == 0).view(-1, 4).sum(1)
        assert int(zeros.min()) == int(zeros.max()) == 2


def test_eager_attention_is_saved(tmp_path: Path) -> None:
    model = make_model("vit")
    model.set_attn_implementation("eager")
    vitprune.save(model, tmp_path)
    assert same_state(vitprune.load(tmp_path), model.state_dict())


class Detector(nn.Module):
    """A backbone and hidden units beside the logits, as those of boxes; its output is a mapping or a tuple."""

    def __init__(self, is_tuple: bool = False) -> None:
        super().__init__()
        self.is_tuple, self.image_size = is_tuple, 32
        self.backbone = tiny("vit", dtype=torch.float32)
        self.boxes = nn.Sequential(nn.Linear(7, 12), nn.GELU(), nn.Linear(12, 4))

    def forward(self, images: Tensor) -> dict[str, Tensor] | tuple[Tensor, Tensor]:
        logits = self.backbone(images)
        boxes = self.boxes(logits.detach())
        return (logits, boxes) if self.is_tuple else {"boxes": boxes, "logits": logits}


@pytest.mark.parametrize("is_tuple", [False, True])
def test_a_rule_for_groups_that_are_left_out_is_not_refused(is_tuple: bool) -> None:
    model, images = Detector(is_tuple).eval(), [torch.randn(6, 3, 32, 32)]
    settings = {"target": {"macs": 0.7}, "calibration": images}
    for more in ({"within": "backbone"}, {"rules": [{"match": "boxes", "ignore": True}]}, {}):
        result = vitprune.prune(model, "unit-obs", **settings, **more)
        assert all(name.startswith("backbone.") for name in result.masks)
        assert result.skipped["boxes"] == "boxes: it does not affect the output that counts; it is not pruned"
        assert "left out: boxes (it does not affect" in str(result)
        assert type(result.model(images[0])) is (tuple if is_tuple else dict)
    with pytest.raises(
        BadInput, match=r"^prune.rules.0: 'box' matches the full name of no group of kind ffn, attention"
    ):
        vitprune.prune(model, "unit-obs", **settings, rules=[{"match": "box", "ignore": True}])


def test_a_timm_model_with_a_mapping_of_features_is_refused() -> None:
    sizes = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
    model = timm.create_model("convnext_atto", features_only=True, feature_cls="dict", **sizes)
    with pytest.raises(BadInput, match=r"^calibration\[0\]: FeatureDictNet returns a OrderedDict, not logits"):
        vitprune.prune(model, "obc", sparsity=0.5, calibration=[torch.randn(2, 3, 64, 64)])
