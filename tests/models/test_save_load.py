"""Saving and loading models: exact, without pickle, in a new process; mismatches are refused."""

import io
import json
import logging
import pickletools
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.support.model_zoo import (
    SMALL,
    SWIN,
    VIT,
    ZOO,
    images,
    predict,
    random_masks,
    redrawn,
    same_state,
    state,
    tiny,
)
from vitprune import BadInput, data, find_groups, load, models, prune, save, shrink
from vitprune.architectures import merge_heads, structure

ELSEWHERE = """
import sys, torch
from safetensors.torch import load_file, save_file
import vitprune
given = load_file(sys.argv[1])
found = {}
for name, x in given.items():
    with torch.no_grad():
        found[name] = vitprune.load(f"{sys.argv[2]}/{name}")(x)
save_file(found, sys.argv[3])
"""


def single(name: str, seed: int = 0) -> nn.Module:
    """A model of the zoo in float32, as models are saved."""
    return tiny(name, seed, torch.float32)


def uneven(name: str, kinds: list[str], merged: int | None = None) -> nn.Module:
    """A model with a different width in every block."""
    model = single(name)
    groups = merge_heads(model, find_groups(model, kinds), merged)
    masks = {}
    for index, group in enumerate(groups):
        masks |= random_masks([group], min(1 + index, group.shape[-1] - 1), seed=index)
    return shrink(model, groups, masks)


def cut_models() -> dict[str, nn.Module]:
    twice = uneven("vit", ["head"])
    groups = find_groups(twice, ["attention", "residual"])
    result = {
        "dense": single("vit"),
        "ffn": uneven("vit", ["ffn"]),
        "attention": uneven("odd", ["attention"]),
        "residual": uneven("distilled", ["residual"]),
        "all": uneven("extra", ["residual", "attention", "ffn"]),
        "merged": uneven("vit", ["attention", "ffn"], merged=1),
        "heads": uneven("vit", ["head", "ffn"]),
        "heads-then-channels": shrink(twice, groups, random_masks(groups, 0.25)),
        "weights": prune(single("vit"), "magnitude", sparsity=0.5).model,
        "swin": uneven("swin", ["attention", "ffn"]),
        "swin-heads": uneven("swin", ["head", "ffn"]),
        "swin-all": uneven("swin", ["residual", "attention", "ffn"]),
        "pvt": uneven("pvt", ["residual", "attention", "ffn"]),
        "pvt-linear": uneven("pvt-linear", ["residual", "head", "ffn"]),
    }
    norms = redrawn(timm.create_model("vit_tiny_patch16_224", **VIT, qk_norm=True), 0)
    groups = find_groups(norms, ["head"])
    return result | {"normed-heads": shrink(norms, groups, random_masks(groups, 1))}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, nn.Module]]:
    folder, made = tmp_path_factory.mktemp("saved"), cut_models()
    for name, model in made.items():
        save(model, folder / name)
    return folder, made


def test_a_new_process_gives_bit_identical_logits(saved: tuple[Path, dict[str, nn.Module]], tmp_path: Path) -> None:
    folder, made = saved
    given = {name: images(model) for name, model in made.items()}
    save_file(given, tmp_path / "images.safetensors")
    words = [str(tmp_path / "images.safetensors"), str(folder), str(tmp_path / "logits.safetensors")]
    subprocess.run(
        [sys.executable, "-W", "error", "-c", ELSEWHERE, *words], check=True, env={"OMP_NUM_THREADS": "1"}, timeout=120
    )
    result = load_file(tmp_path / "logits.safetensors")
    assert result.keys() == made.keys()
    for name, model in made.items():
        assert torch.equal(result[name], predict(model, given[name])), name


def test_a_loaded_model_equals_the_saved_one(saved: tuple[Path, dict[str, nn.Module]]) -> None:
    folder, made = saved
    for name, model in made.items():
        again = load(folder / name)
        assert type(again) is type(model)
        assert not again.training
        assert same_state(again, state(model)), name
        assert structure(again) == structure(model)
        assert all(p.requires_grad for p in again.parameters())


def test_a_model_pruned_to_one_traced_head_is_saved(tmp_path: Path) -> None:
    model = redrawn(timm.create_model("bat_resnext26ts", num_classes=5), 0)  # one head: its channels look like heads
    groups = find_groups(model, ["head"])
    save(shrink(model, groups, random_masks(groups, 1)), tmp_path)
    assert structure(load(tmp_path)) == structure(model)
    assert structure(model)[groups[0].name] == (1,)


def test_both_files_have_the_permissions_of_new_files(saved: tuple[Path, dict[str, nn.Module]], tmp_path: Path) -> None:
    (tmp_path / "new").touch()
    expected = (tmp_path / "new").stat().st_mode
    directory = saved[0] / next(iter(saved[1]))
    assert {path.stat().st_mode for path in directory.iterdir()} == {expected}


def test_a_model_is_two_files_and_no_pickle(saved: tuple[Path, dict[str, nn.Module]]) -> None:
    folder, made = saved
    for name in made:
        files = sorted(path.name for path in (folder / name).iterdir())
        assert files == ["config.json", "model.safetensors"]
        config = json.loads((folder / name / "config.json").read_text())
        assert config["vitprune"]["format"] == 1
        raw = (folder / name / "model.safetensors").read_bytes()
        size = int.from_bytes(raw[:8], "little")
        assert json.loads(raw[8 : 8 + size])  # a JSON header, then raw numbers
        for path in (folder / name).iterdir():
            start = path.read_bytes()[:2]
            assert start not in (b"PK", b"\x1f\x8b")
            assert not (start[:1] == b"\x80" and 2 <= start[1] <= 5)  # the magic of a pickle
            with pytest.raises(ValueError, match=r"."):
                list(pickletools.genops(path.read_bytes()))
        assert b"vitprune." not in raw


def test_a_loaded_model_can_be_shrunk_and_saved_again(saved: tuple[Path, dict[str, nn.Module]], tmp_path: Path) -> None:
    folder, _ = saved
    for name in ("all", "merged", "heads", "swin-heads", "pvt-linear"):
        model = load(folder / name)
        groups = find_groups(model, ["ffn", "attention"])
        shrink(model, groups, random_masks(groups, 2))
        save(model, tmp_path / name)
        again = load(tmp_path / name)
        assert same_state(again, state(model))
        x = images(model)
        assert torch.equal(predict(again, x), predict(model, x))


def test_the_data_config_is_saved(tmp_path: Path) -> None:
    model = models.create("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "in_chans": 1, "depth": 1})
    save(model, tmp_path)
    before, after = data.data_config(model), data.data_config(load(tmp_path))
    assert before["crop_pct"] == 1.0  # the published crop of 0.9 is for 224 pixels
    assert {key: tuple(v) if isinstance(v, list) else v for key, v in after.items()} == before


def test_saving_twice_writes_the_same_bytes(saved: tuple[Path, dict[str, nn.Module]], tmp_path: Path) -> None:
    folder, _ = saved
    for name in ("all", "swin", "pvt"):
        save(load(folder / name), tmp_path / name)
        for file in ("config.json", "model.safetensors"):
            assert (tmp_path / name / file).read_bytes() == (folder / name / file).read_bytes()


UNIFORM = [
    ("vit", {"ffn": 0.3, "attention": 0.25, "residual": 0.25}),
    ("vit", {"ffn": 0.31}),
    ("deit", {"head": 0.34, "residual": 1 / 3}),
    ("distilled", {"attention": 0.5, "residual": 0.5}),
    ("extra", {"ffn": 0.5}),
    ("swin", None),
    ("pvt", {"ffn": 0.25, "attention": 0.5, "residual": 0.5}),
    ("pvt", {"ffn": 0.25}),
    ("pvt-linear", {"ffn": 0.5, "attention": 0.5, "residual": 0.5}),
]


@pytest.mark.parametrize(("name", "sparsity"), UNIFORM)
def test_a_uniform_model_loads_in_plain_timm(name: str, sparsity: dict | None, tmp_path: Path) -> None:
    model = single(name)
    pruned = (
        prune(model, "channel-magnitude", sparsity=sparsity).model
        if sparsity
        else prune(model, "magnitude", sparsity=0.5).model
    )
    save(pruned, tmp_path / "model")
    plain = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    x = images(model)
    assert same_state(plain, state(pruned))
    torch.testing.assert_close(predict(plain, x), predict(pruned, x), rtol=0, atol=1e-6)


def test_merged_heads_load_in_plain_timm(tmp_path: Path) -> None:
    twelve = VIT | {"embed_dim": 96, "num_heads": 12}
    model = redrawn(timm.create_model("vit_tiny_patch16_224", **twelve), 0)
    x = images(model)
    share = {"attention": 0.5, "ffn": 0.5, "residual": 0.5}
    pruned = prune(model, "channel-magnitude", sparsity=share, example_input=x, merge_heads_to=3).model
    assert [(b.attn.num_heads, b.attn.head_dim) for b in pruned.blocks] == [(3, 16)] * 2
    save(pruned, tmp_path)
    plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    torch.testing.assert_close(predict(plain, x), predict(pruned, x), rtol=0, atol=1e-6)
    assert torch.equal(predict(load(tmp_path), x), predict(pruned, x))


def test_a_directory_saved_by_timm_loads(tmp_path: Path) -> None:
    model = single("vit")
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    assert same_state(load(tmp_path), state(model))


def test_create_is_seeded_and_does_not_change_the_global_random_state() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (models.create("vit_tiny_patch16_224", VIT, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert same_state(again, state(first))
    assert not same_state(other, state(first))


def test_create_accepts_a_checkpoint(tmp_path: Path) -> None:
    model = single("swin")
    models.write_weights(model.state_dict(), tmp_path / "swin.safetensors")
    again = models.create(ZOO["swin"][0], SWIN, checkpoint=tmp_path / "swin.safetensors")
    assert same_state(again, state(model))
    with pytest.raises(BadInput, match=r"weight blocks.0.attn.proj.bias is missing"):
        models.create(ZOO["vit"][0], VIT, checkpoint=tmp_path / "swin.safetensors")


@pytest.mark.parametrize(
    ("name", "args"),
    [("no_such_model", {}), ("vit_tiny_patch16_224", {"color": "red"}), ("vit_tiny_patch16_224", {"num_heads": 5})],
)
def test_models_that_timm_cannot_create_are_refused(name: str, args: dict) -> None:
    with pytest.raises(BadInput, match=f"^model.name '{name}': timm cannot create it") as error:
        models.create(name, args)
    assert "\n" not in str(error.value)


def test_weights_that_cannot_be_downloaded_are_refused_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BadInput, match=r"^model.name 'vit_tiny_patch16_224': .*; without a network, give a file of w"):
        models.create("vit_tiny_patch16_224", {"cache_dir": str(tmp_path)}, pretrained=True)


def test_a_hub_that_does_not_answer_gives_one_error_and_no_lines_about_retries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger, lines = logging.getLogger("huggingface_hub"), io.StringIO()
    monkeypatch.setattr(logger, "handlers", [logging.StreamHandler(lines)])
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    level = logger.level
    with pytest.raises(BadInput, match=r"; without a network, give a file of w"):
        models.create("vit_tiny_patch16_224", {"cache_dir": str(tmp_path)}, pretrained=True)
    assert not lines.getvalue()
    assert logger.level == level


@pytest.mark.real
def test_real_deit_tiny_shrunk_and_loaded(real_deit: nn.Module, tmp_path: Path) -> None:
    pruned = prune(real_deit, "channel-magnitude", sparsity={"ffn": 0.25, "attention": 0.25}, scope="global").model
    save(pruned, tmp_path)
    x = images(pruned, 1)
    assert torch.equal(predict(load(tmp_path), x), predict(pruned, x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_dtype_of_the_weights_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    model = uneven("vit", ["ffn"]).to(dtype)
    save(model, tmp_path)
    assert same_state(load(tmp_path), state(model))
    assert {p.dtype for p in load(tmp_path).parameters()} == {dtype}


def test_tensors_that_overlap_are_saved(tmp_path: Path) -> None:
    model, shared = tiny("vit"), torch.arange(60.0, dtype=torch.float64)
    for block, first in zip(model.blocks, (0, 2), strict=True):
        block.norm1.bias.data = shared[first : first + 48]
    before = state(model)
    save(model, tmp_path)
    assert same_state(load(tmp_path), before)
    parts = {"all": shared, "end": shared[2:], "even": shared[::2], "none": shared[:0], "same": shared}
    models.write_weights(parts, tmp_path / "parts.safetensors")
    read = models.read_weights(tmp_path / "parts.safetensors")
    assert all(torch.equal(read[name], value) for name, value in parts.items())


def _act(model: nn.Module) -> None:
    for block in model.blocks:
        block.mlp.act = nn.ReLU()


def _eps(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5


def _hook(model: nn.Module) -> None:
    model.head.register_forward_hook(lambda module, inputs, output: 2 * output)


def _forward(model: nn.Module) -> None:
    model.forward = lambda x: model.forward_features(x)[:, 0]


CHANGES = {
    "activation": (_act, r"^blocks.0.mlp.act: is ReLU, timm builds GELU; config.json does not record it"),
    "eps": (_eps, r"^blocks.0.norm1.eps: differs from the model that timm builds; config.json does not record it"),
    "a part that is skipped": (lambda model: setattr(model, "norm", nn.Identity()), r"timm does not build this model"),
    "classifier": (
        lambda model: setattr(model, "head", nn.Linear(48, 5)),
        r"^VisionTransformer: .*weight head.bias has shape \[5\], the model needs \[7\]\); .*by reset_classifier",
    ),
    "two layers": (
        lambda model: setattr(model, "head", nn.Sequential(nn.Linear(48, 16), nn.GELU(), nn.Linear(16, 7))),
        r"^VisionTransformer: .*\(weight head.0.bias is not in VisionTransformer\)",
    ),
    "no classifier": (lambda model: setattr(model, "head", nn.Identity()), r"\(weight head.bias is missing\)"),
    "stem": (lambda model: setattr(model.patch_embed, "proj", nn.Conv2d(1, 48, 8, 8)), r"has shape \[48, 1, 8, 8\]"),
    "attention": (lambda model: setattr(model.blocks[0], "attn", nn.Identity()), r"attn.proj.bias is missing"),
    "not finite": (lambda model: nn.init.constant_(model.head.weight, float("nan")), r"^head.weight: has values that"),
    "hook": (_hook, r"^VisionTransformer: has hooks or unknown attributes, and its logits differ"),
    "forward": (_forward, r"^VisionTransformer: its method forward was replaced by a function; give "),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_its_config_does_not_describe_is_not_saved(change: str, tmp_path: Path) -> None:
    make, message = CHANGES[change]
    model = single("vit")
    make(model)
    with pytest.raises(BadInput, match=message):
        save(model, tmp_path / "model")
    assert not list(tmp_path.rglob("*.json")) + list(tmp_path.rglob("*.safetensors"))


def test_changes_without_an_effect_on_the_logits_are_saved(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", **VIT, act_layer="relu", drop_path_rate=0.1).eval()
    model.set_grad_checkpointing(True)
    model.head.register_forward_hook(lambda module, inputs, output: None)
    for block in model.blocks:
        block.mlp.drop1.p, block.attn.fused_attn = 0.3, False
    model.reset_classifier(5)
    save(model, tmp_path)
    torch.testing.assert_close(predict(load(tmp_path), images(model)), predict(model, images(model)))


@pytest.mark.filterwarnings("ignore")  # of timm, on the interpolation of position tables
@pytest.mark.parametrize("name", ["beit_base_patch16_224", "swinv2_tiny_window8_256"])
@pytest.mark.parametrize("kind", ["head", "attention"])
def test_the_input_size_of_a_pruned_model_can_be_changed(name: str, kind: str, tmp_path: Path) -> None:
    model = redrawn(timm.create_model(name, num_classes=7, **SMALL[name]), 0)
    pruned, x = prune(model, "channel-magnitude", sparsity={kind: 0.34}).model, torch.ones(1, 3, 64, 64)
    pruned.set_input_size(img_size=(64, 64))
    save(pruned, tmp_path)
    assert torch.equal(predict(load(tmp_path), x), predict(pruned, x))


def test_a_model_with_cached_tensors_is_saved_and_pruned(tmp_path: Path) -> None:
    model = timm.create_model("levit_128s").eval()
    model(torch.zeros(1, 3, 224, 224))  # caches biases that take gradients, which cannot be copied
    save(model, tmp_path)
    assert not model.training
    assert prune(model, "magnitude", sparsity=0.5).sparsity["weight"] == pytest.approx(0.5, abs=1e-3)
