"""Residual groups of models found by tracing: names, bookkeeping in timm, and refusals."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from tests.support.model_zoo import SMALL, images, predict, tiny
from tests.support.plans import context
from tests.support.reference_kl import assert_fades
from vitprune import BadInput, find_groups, load, save, shrink
from vitprune.architectures.tracing import cache
from vitprune.criteria.kl.fisher import fisher_kl_per_image
from vitprune.evaluation.check_model import make_test_model, random_odd_masks

STAGES = {
    "convnext_atto": ["stem.0", "stages.1.downsample.1", "stages.2.downsample.1", "stages.3.downsample.1"],
    "levit_128s": ["stem.conv4.linear", "stages.1.downsample.attn_downsample.proj.ln.linear"],
    "xcit_nano_12_p16_224": ["patch_embed.proj.6.0"],
    "poolformer_s12": ["stem.conv", "stages.1.downsample.conv", "stages.2.downsample.conv", "stages.3.downsample.conv"],
}


def made(name: str) -> Any:
    return make_test_model(name, SMALL.get(name, {}) | {"num_classes": 7})


@pytest.mark.parametrize("name", STAGES)
def test_streams_are_named_after_their_first_writer(name: str) -> None:
    result = [group.name for group in find_groups(made(name)[0], ["residual"])]
    assert result[: len(STAGES[name])] == [f"{path}.residual" for path in STAGES[name]]


@pytest.mark.parametrize("name", ["convnext_atto", "levit_128s", "xcit_nano_12_p16_224", "efficientvit_b0"])
@torch.no_grad()
def test_timm_interfaces_report_the_new_widths(name: str) -> None:
    model, inputs = made(name)
    groups = find_groups(model, ["residual"])
    shrink(model, groups, random_odd_masks(groups, 0.4))
    result = model.forward_intermediates(inputs, intermediates_only=True)
    message = [feature["num_chs"] for feature in model.feature_info]
    assert [part.shape[1] for part in result] == message[-len(result) :]
    assert model.forward_head(model.forward_features(inputs), pre_logits=True).shape[-1] == model.head_hidden_size
    model.reset_classifier(3)
    assert model.double()(inputs).shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("beit_base_patch16_224", ["head", "residual", "attention", "ffn"]),
        ("swinv2_tiny_window8_256", ["residual", "head", "ffn"]),
        ("convit_tiny", ["attention", "residual", "ffn"]),
        ("twins_pcpvt_small", ["residual", "attention", "ffn"]),
        ("efficientvit_b0", ["head", "residual", "ffn"]),
    ],
)
@torch.no_grad()
def test_all_kinds_pruned_in_turn_are_saved_and_loaded(name: str, kinds: list[str], tmp_path: Path) -> None:
    model, inputs = made(name)
    for kind in kinds:
        groups = find_groups(model, [kind])
        shrink(model, groups, random_odd_masks(groups, 0.4))
    save(model, tmp_path)
    assert torch.equal(load(tmp_path)(inputs), model.eval()(inputs))


def test_fisher_score_of_a_residual_channel_of_a_feature_map() -> None:
    model, inputs = made("convnext_atto")
    groups = find_groups(model, ["residual"])
    assert_fades(
        model,
        inputs,
        groups,
        fisher_kl_per_image(model, groups, inputs, context(fisher_directions=1000)),
    )


def test_a_residual_stream_that_is_the_output_is_refused() -> None:
    model = timm.create_model("xcit_nano_12_p16_224", num_classes=0, **SMALL["xcit_nano_12_p16_224"])
    with pytest.raises(
        BadInput, match=r"^patch_embed.proj.6.0: the residual stream .* \(.*it is the output of the model\)$"
    ):
        find_groups(model, ["residual"])


class Counting(nn.Module):
    """A module with a hard-coded width of the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.write, self.head = nn.Conv2d(3, 6, 4, stride=4), nn.Conv2d(6, 6, 1), nn.Linear(6, 2)
        self.num_classes, self.pretrained_cfg = 2, {"input_size": (3, 8, 8)}

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stem(image)
        x = x + self.write(x)
        output: torch.Tensor = self.head(torch.reshape(x, (len(x), 6, -1)).mean(2))
        return output


def test_a_hard_coded_width_is_refused() -> None:
    with pytest.raises(BadInput, match=r"^Counting: with a narrower residual stream it does not run "):
        find_groups(Counting(), ["residual"])


def test_the_trace_is_cached_while_shapes_are_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = made("convnext_atto")
    first = [group.name for group in find_groups(model, ["residual"])]
    monkeypatch.setattr(cache, "run_trace", lambda *given: pytest.fail("traced again"))
    assert [group.name for group in find_groups(model, ["residual"])] == first


@pytest.mark.parametrize("classifier", [[None], True, "no.such.layer", ["head", 3]])
def test_a_malformed_classifier_in_the_config_of_timm_is_ignored(vit: nn.Module, classifier: object) -> None:
    expected = tiny("vit")
    vit.pretrained_cfg = {**vit.pretrained_cfg, "classifier": classifier}
    for model in (vit, expected):
        for kind in ("residual", "ffn"):
            groups = find_groups(model, [kind])
            shrink(model, groups, {g.name: torch.arange(g.units).view(g.shape) < g.units // 2 for g in groups})
    assert (vit.embed_dim, vit.num_features) == (expected.embed_dim, expected.num_features) == (24, 24)
    torch.testing.assert_close(predict(vit, images(vit)), predict(expected, images(vit)))
