"""Every supported kind of group per model passes `vitprune check`; unsupported ones are refused by name."""

import re

import pytest
import timm
import torch

from tests.support.model_zoo import LEFT_OUT, PROVEN, REFUSED, SMALL, ZOO, batches
from vitprune import BadInput, find_groups, prune
from vitprune.architectures.traced_groups import left_out
from vitprune.config.prune_config import KINDS
from vitprune.evaluation.check_model import check, make_test_model
from vitprune.evaluation.cost import count_macs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["vit", "extra", "distilled", "swin", "pvt", "pvt-linear"])
def test_check_proves_models_that_store_sizes(name: str, kind: str) -> None:
    architecture, args = ZOO[name]
    rows = list(check(architecture, [kind], [0.5], args))
    if kind in ("qk", "vo") and name in ("swin", "pvt", "pvt-linear"):  # one size for q, k and v
        assert [row.verdict for row in rows] == ["refused"]
        assert "its forward pass needs the old sizes; tried to change dim" in rows[0].why
        return
    assert [(row.verdict, row.why) for row in rows] == [("proven", "")]
    assert rows[0].proof.params_after <= rows[0].proof.params_before


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in PROVEN for kind in PROVEN[name].split()])
def test_check_proves_models_of_known_modules(name: str, kind: str) -> None:
    rows = list(check(name, [kind], [0.5], SMALL.get(name, {}) | {"num_classes": 7}))
    assert [(row.verdict, row.why) for row in rows] == [("proven", "")]
    assert kind == "weight" or rows[0].proof.params_after < rows[0].proof.params_before


@pytest.mark.parametrize(("name", "kind", "why"), REFUSED)
def test_unsupported_kinds_are_refused(name: str, kind: str, why: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, **SMALL.get(name, {}))
    with pytest.raises(BadInput, match=why):
        find_groups(model, [kind])


@pytest.mark.parametrize(("name", "kind", "group", "why"), LEFT_OUT)
def test_modules_that_cannot_be_cut_are_left_out(name: str, kind: str, group: str, why: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, **SMALL.get(name, {}))
    assert group not in {one.name for one in find_groups(model, [kind])}
    assert re.search(why, left_out(model, kind)[group])


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "swinv2_tiny_window8_256"])
def test_unit_obs_refuses_attention_without_a_fused_qkv(name: str) -> None:
    model = timm.create_model(name, num_classes=7, **SMALL[name])
    with pytest.raises(
        BadInput, match=r"its q, k and v do not come from plain Linear layers, .*; use heads or ffn here$"
    ):
        prune(model, "unit-obs", sparsity={"attention": 0.5}, calibration=batches(model))


def test_a_model_without_a_classifier_is_proven_with_one() -> None:
    dense, _ = make_test_model("vit_small_patch14_dinov2", {"depth": 1, "embed_dim": 48, "num_heads": 3})
    assert dense.num_classes == 10


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "swinv2_tiny_window8_256", "vit_base_patch16_siglip_224"])
def test_macs_are_counted_where_weights_are_used(name: str) -> None:
    dense, inputs = make_test_model(name, SMALL[name])
    total, layers = count_macs(dense, inputs[:1])
    assert [
        group.name for group in find_groups(dense, ["weight"]) if not layers.get(group.name[: -len(".weight")])
    ] == []
    assert 0 < sum(layers.values()) < total
