"""Models of other libraries and user-defined ones: pruned, saved, loaded in a new process and by their own library."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import vitprune
from tests.architectures.test_traced_groups import SIZES, Attention, Encoder
from tests.support.other_models import OTHERS, TRANSFORMERS, make_model
from vitprune import BadInput
from vitprune.runtime.input_size import input_size
from vitprune.runtime.outputs import main_tensor

# models whose configuration has a number of heads, a width of heads and of hidden units
UNIFORM = ("vit", "vit features", "deit", "dinov2", "dinov2 registers", "beit", "rf-detr")
LOAD = """
import sys, torch, vitprune
from vitprune.runtime.outputs import main_tensor
images, model = torch.load(sys.argv[2], weights_only=True), vitprune.load(sys.argv[1])
with torch.no_grad():  # with gradients, attention takes another kernel
    torch.save(main_tensor(model(images)), sys.argv[3])
"""


def images_for(name: str, model: nn.Module, number: int = 2) -> Tensor:
    return torch.randn(number, 3, *SIZES.get(name, input_size(model)[1:]), generator=torch.Generator().manual_seed(2))


def pruned(name: str, **settings: object) -> tuple[vitprune.PruneResult, Tensor]:
    model = make_model(name)
    images = images_for(name, model)
    settings = {"sparsity": {"ffn": 0.5, "head": 0.5}, "scope": "layer", "calibration": [images]} | settings
    return vitprune.prune(model, "channel-magnitude", **settings), images


@torch.no_grad()
def answer(model: nn.Module, images: Tensor) -> Tensor:
    return main_tensor(model(images))


@pytest.mark.parametrize("name", list(TRANSFORMERS))
def test_a_pruned_transformers_model_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    result, images = pruned(name)
    expected = answer(result.model, images)
    vitprune.save(result.model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    if config["vitprune"]["library"] == "own":
        loaded = vitprune.load_into(make_model(name, seed=1), tmp_path)
    else:
        loaded = vitprune.load(tmp_path)
        assert type(loaded) is type(result.model)
    assert torch.equal(answer(loaded, images), expected)
    assert not loaded.training
    assert (config["vitprune"]["structure"] == {}) == (name in UNIFORM)
    if name in UNIFORM:
        plain = type(result.model).from_pretrained(tmp_path).eval()
        torch.testing.assert_close(answer(plain, images), expected)


def test_a_new_process_loads_a_model_with_widths_per_layer(tmp_path: Path) -> None:
    result, images = pruned("clip", sparsity=None, target={"macs": 0.6}, scope=None)
    assert result.after.macs == pytest.approx(0.6 * result.before.macs, rel=0.03)
    vitprune.save(result.model, tmp_path / "model")
    torch.save(images, tmp_path / "images.pt")
    command = [sys.executable, "-c", LOAD, tmp_path / "model", tmp_path / "images.pt", tmp_path / "answer.pt"]
    subprocess.run(command, check=True)
    assert torch.equal(torch.load(tmp_path / "answer.pt", weights_only=True), answer(result.model, images))


@pytest.mark.parametrize("name", list(OTHERS))
def test_models_without_a_public_class_are_loaded_into_a_dense_one(name: str, tmp_path: Path) -> None:
    result, images = pruned(name)
    vitprune.save(result.model, tmp_path)
    with pytest.raises(BadInput, match=r"config.json: a model of the class \w+; call vitprune.load_into\(\w+"):
        vitprune.load(tmp_path)
    loaded = vitprune.load_into(make_model(name, seed=1), tmp_path)
    assert torch.equal(answer(loaded, images), answer(result.model, images))


def test_a_torchvision_model_is_loaded_by_its_name(tmp_path: Path) -> None:
    args = {"num_classes": 7, "image_size": 32}
    model = torchvision.models.vit_b_16(**args).eval()
    model.encoder.layers = model.encoder.layers[:2]  # two blocks are enough
    result = vitprune.prune(model, "channel-magnitude", sparsity={"head": 0.5}, scope="layer")
    with pytest.raises(BadInput, match=r"^VisionTransformer: torchvision does not build this model from its config"):
        vitprune.save(result.model, tmp_path, factory="torchvision:vit_b_16", args=args)
    assert not (tmp_path / "config.json").exists()
    swin = torchvision.models.swin_t(num_classes=3).eval()
    result = vitprune.prune(swin, "channel-magnitude", sparsity={"ffn": 0.5}, scope="layer")
    vitprune.save(result.model, tmp_path, factory="torchvision:swin_t", args={"num_classes": 3})
    images = torch.randn(1, 3, 224, 224)
    assert torch.equal(answer(vitprune.load(tmp_path), images), answer(result.model, images))
    with pytest.raises(BadInput, match=r"^factory 'keras:vit': unknown; write torchvision:NAME$"):
        vitprune.save(result.model, tmp_path, factory="keras:vit")


def test_only_the_groups_of_a_backbone_are_pruned() -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.neck = (
                make_model("dinov2"),
                nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 6)),
            )
            self.image_size = 56

        def forward(self, images: Tensor) -> dict[str, Tensor]:
            return {"logits": self.neck(self.backbone(images).last_hidden_state.mean(1))}

    model = Detector().eval()
    images = torch.randn(4, 3, 56, 56)
    result = vitprune.prune(model, "unit-obs", target={"macs": 0.6}, calibration=[images], within="backbone")
    inside = {name for name, mask in result.masks.items() if not mask.all()}
    assert inside
    assert all(name.startswith("backbone.") for name in inside)
    assert result.model.neck[0].out_features == 48
    assert isinstance(result.model(images), dict)
    with pytest.raises(BadInput, match=r"^within 'body': the model has no module of this name; give a path of"):
        vitprune.prune(model, "magnitude", sparsity=0.5, within="body")


def test_a_wrapped_timm_model_is_pruned_as_a_whole(tmp_path: Path) -> None:
    import timm

    class Normalized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            settings = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
            self.net, self.image_size = timm.create_model("vit_tiny_patch16_224", **settings), 32

        def forward(self, x: Tensor) -> Tensor:
            return self.net((x - 0.5) / 0.2)

    torch.manual_seed(0)
    model, images = Normalized().eval(), torch.rand(4, 3, 32, 32)
    result = vitprune.prune(model, "unit-obs", target={"macs": 0.6}, calibration=[images])
    vitprune.save(result.model, tmp_path)
    loaded = vitprune.load_into(Normalized(), tmp_path)
    assert torch.equal(answer(loaded, images), answer(result.model, images))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            {"vitprune": {"library": "keras"}},
            "not written by vitprune.save for a model that is not timm's; load timm's with vitprune.load",
        ),
        ({"format": 9}, r"vitprune.format is not 1, the only one that this version reads; update vitprune"),
        ({"name": "os.system"}, "vitprune.name is not the name of a model"),
        ({"name": "AutoModel"}, r"transformers cannot build AutoModel \(.* has no model class 'AutoModel'\)"),
        ({"input_size": [3, 0, 64]}, "vitprune.input_size must be channels, height and width"),
        ({"structure": {"vit.layers.0.mlp": [4000]}}, r"vitprune.structure: .*does not fit into|vitprune.structure: "),
        ({"hidden_size": 1 << 30}, r"hidden_size is larger than 1048576; correct it"),
        ({"hidden_act": "../../evil.py"}, r"hidden_act is '../../evil.py'; a text argument must be a plain name"),
        ({"num_hidden_layers": 90000}, r"transformers cannot build ViTForImageClassification \("),
        ({"use_pretrained_backbone": True}, "use_pretrained_backbone: names a source of weights or code; remove it"),
    ],
)  # fmt: skip
def test_an_untrusted_config_is_refused(change: dict[str, object], why: str, tmp_path: Path) -> None:
    vitprune.save(make_model("vit"), tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config = config | change if not change.keys() & config["vitprune"].keys() else config
    config["vitprune"] |= {key: value for key, value in change.items() if key in config["vitprune"]}
    path.write_text(json.dumps(config))
    with pytest.raises(BadInput, match=rf"config.json: ({why})"):
        vitprune.load(tmp_path)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    vitprune.save(make_model("vit"), tmp_path / "vit")
    vitprune.save(Encoder(Attention(32, 4)), tmp_path / "own")
    with pytest.raises(BadInput, match=r"config.json: was written for the class Encoder, the model is a Linear$"):
        vitprune.load_into(nn.Linear(2, 2), tmp_path / "own")
    other = Encoder(Attention(32, 4))
    other.head = nn.Linear(32, 6)
    with pytest.raises(BadInput, match=r"model.safetensors: weight head.bias has shape \[5\], the model needs \[6\]$"):
        vitprune.load_into(other, tmp_path / "own")
    assert set(load_file(tmp_path / "vit/model.safetensors")) == set(make_model("vit").state_dict())


def test_a_changed_forward_pass_is_not_saved(tmp_path: Path) -> None:
    model = make_model("vit")
    model.vit.layers[0].mlp.activation_fn = nn.ReLU()
    with pytest.raises(BadInput, match=r"^ViTForImageClassification: its configuration does not describe it; "):
        vitprune.save(model, tmp_path)
    assert isinstance(model, transformers.PreTrainedModel)


def test_a_transformers_classifier_is_fine_tuned_with_a_teacher() -> None:
    result, images = pruned("vit", sparsity={"ffn": 0.5})
    teacher, batches = make_model("vit"), [(images, torch.tensor([1, 2]))] * 2
    history = vitprune.finetune(result.model, batches, vitprune.TrainConfig(epochs=2, lr=1e-3), teacher=teacher)
    assert history[1]["loss"] < history[0]["loss"]
    assert {"num_classes", "in_chans", "pretrained_cfg"}.isdisjoint(vars(result.model))
    assert set(vitprune.evaluate(result.model, batches)) >= {"top1", "params", "macs"}
    assert list(result.model(images).keys()) == ["logits"]


@pytest.mark.parametrize("name", ["vit features", "rf-detr"])
def test_features_are_closer_to_dense_than_by_magnitude(name: str) -> None:
    model = make_model(name)
    images, other = images_for(name, model, 16), torch.randn(8, *images_for(name, model).shape[1:])
    axis = 1 if name == "rf-detr" else -1

    def distance(method: str) -> float:
        result = vitprune.prune(model, method, sparsity={"ffn": 0.5}, scope="layer", calibration=[images])
        return 1 - float(torch.cosine_similarity(answer(result.model, other), answer(model, other), dim=axis).mean())

    assert distance("unit-obs") < 0.2 * distance("channel-magnitude")


class TorchEncoder(nn.Module):
    """A classifier of torch's own encoder layers."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, norm_first=norm_first)
        self.image_size, self.patches, self.head = 32, nn.Conv2d(3, 32, 8, 8), nn.Linear(32, 5)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(self.patches(images).flatten(2).transpose(1, 2)).mean(1))


class Flat(nn.Module):
    """A classifier of one attention that is not a module of its own, and whose reshapes need its width."""

    def __init__(self) -> None:
        super().__init__()
        self.image_size, self.patches, self.head = 32, nn.Conv2d(3, 32, 8, 8), nn.Linear(32, 5)
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        batch, tokens, width = x.shape
        q, k, v = (layer(x).reshape(batch, tokens, 4, width // 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = ((q @ k.transpose(2, 3) * (width // 4) ** -0.5).softmax(-1) @ v).transpose(1, 2)
        x = x + self.out(mixed.reshape(batch, tokens, width))
        return self.head(x.mean(1))


@pytest.mark.parametrize("norm_first", [False, True])
def test_heads_of_torchs_encoder_layers_are_pruned(norm_first: bool, tmp_path: Path) -> None:
    model, images = TorchEncoder(norm_first).eval(), torch.randn(4, 3, 32, 32)
    groups = vitprune.find_groups(model, ["head", "ffn"])
    sparsity = {"head": 0.5, "ffn": 0.25}
    result = vitprune.prune(model, "unit-obs", sparsity=sparsity, calibration=[images], scope="layer")
    assert result.model.encoder.layers[0].self_attn.out_proj.in_features == 16
    with_gradients = result.model(images)  # without, torch's layers call a fused kernel
    torch.testing.assert_close(answer(result.model, images), with_gradients, rtol=1e-4, atol=1e-5)
    result = vitprune.prune(model, "channel-magnitude", sparsity=sparsity, scope="layer")
    with torch.no_grad():
        torch.testing.assert_close(
            result.model(images), vitprune.zero(model, groups, result.masks)(images), rtol=1e-4, atol=1e-5
        )
    vitprune.save(result.model, tmp_path)
    loaded = vitprune.load_into(TorchEncoder(norm_first), tmp_path)
    assert torch.equal(answer(loaded, images), answer(result.model, images))


def test_a_model_whose_own_forward_pass_contains_its_width_is_saved_under_its_name(tmp_path: Path) -> None:
    model, images = Flat().eval(), torch.randn(4, 3, 32, 32)
    result = vitprune.prune(model, "channel-magnitude", sparsity={"attention": 0.5})
    assert result.model.q.out_features == 16
    vitprune.save(result.model, tmp_path)
    with pytest.raises(BadInput, match=r"a model of the class Flat; call vitprune.load_into\(Flat\("):
        vitprune.load(tmp_path)
    for dense in (Flat(), result.model):
        loaded = vitprune.load_into(dense, tmp_path)
        assert torch.equal(answer(loaded, images), answer(result.model, images))
