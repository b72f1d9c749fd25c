"""Removal of whole residual blocks in models of any family."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import Mlp
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from tests.support.model_zoo import SMALL, ZOO, batches, cost, images, predict, redrawn, same_state, state, tiny
from tests.support.pruned_models import rebuild
from tests.support.reference_kl import kl
from vitprune import BadInput, find_groups, load, prune, save, score, shrink
from vitprune.architectures import structure
from vitprune.architectures.block_removal import IdentityBlock
from vitprune.evaluation.check_model import check
from vitprune.evaluation.cost import group_costs
from vitprune.groups import Group, mask_without
from vitprune.pipeline.artifacts import mask_facts

PYRAMIDS = ["swin", "pvt", "pvt-linear"]


def small(name: str) -> nn.Module:
    return redrawn(timm.create_model(name, **SMALL[name] | {"num_classes": 7}), 0)


def noise(model: nn.Module, side: int = 32) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1)).to(next(model.parameters()))


def paths(model: nn.Module) -> list[str]:
    (group,) = find_groups(model, ["block"])
    assert (group.name, group.units) == ("blocks", len(group.sublayers))
    assert group.sublayers[::2] == group.sublayers[1::2]
    return [path for (path,) in group.sublayers[::2]]


def giving_back(model: nn.Module, removed: list[str]) -> nn.Module:
    """Return a copy in which these blocks return their input, at their full size."""
    model = copy.deepcopy(model)
    for path in removed:
        model.get_submodule(path).register_forward_hook(lambda block, given, output: given[0])
    return model


def mask_of(group: Group, removed: list[str]) -> dict[str, Tensor]:
    return {group.name: torch.tensor([path not in removed for (path,) in group.sublayers])}


def skipping(model: nn.Module, removed: list[str]) -> nn.Module:
    (group,) = find_groups(model, ["block"])
    return shrink(copy.deepcopy(model), [group], mask_of(group, removed))


EXPECTED = {
    "beit_base_patch16_224": ["blocks.0", "blocks.1"],
    "twins_svt_small": ["blocks.0.0", "blocks.0.1", "blocks.1.0", "blocks.2.0", "blocks.3.0"],
    "xcit_nano_12_p16_224": ["blocks.0", "blocks.1"],  # blocks of the class token add to the output of its norm
    "convnext_atto": [f"stages.{at}" for at in ("0.blocks.0", "1.blocks.0", "2.blocks.0", "2.blocks.1", "3.blocks.0")],
    "cait_xxs24_224": ["blocks.0", "blocks.1"],  # the first input of class-token blocks is not the class token
    "efficientformer_l1": [
        f"stages.{at}" for at in ("0.blocks.0", "1.blocks.0", "2.blocks.0", "3.blocks.0", "3.blocks.2")
    ],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_removable_blocks_per_model(name: str) -> None:
    assert paths(small(name)) == EXPECTED[name]


@pytest.mark.parametrize("name", PYRAMIDS)
def test_every_block_of_swin_and_pvt_can_be_removed_and_others_shrunk(name: str, tmp_path: Path) -> None:
    model = tiny(name).float()
    every, x = paths(model), images(model)
    assert every == [path for path, module in model.named_modules() if type(module).__name__.endswith("Block")]
    for path in every:
        smaller = skipping(model, [path])
        assert torch.equal(predict(smaller, x), predict(giving_back(model, [path]), x))
    assert paths(smaller) == every[:-1]
    groups = find_groups(smaller, ["ffn", "residual"])
    shrink(smaller, groups, {g.name: torch.arange(g.units) < g.units - g.units // 4 for g in groups})
    save(smaller, tmp_path)
    again = load(tmp_path)
    assert type(again.get_submodule(every[-1])) is IdentityBlock
    assert same_state(again, state(smaller))
    assert structure(again) == structure(smaller)
    assert torch.equal(predict(again, x), predict(smaller, x))


def test_structure_lists_exactly_the_removed_blocks() -> None:
    dense = tiny("swin")
    assert not any(name.endswith(".skipped") for name in structure(dense))
    smaller = skipping(dense, ["layers.0.blocks.1", "layers.1.blocks.0"])
    names = [name for name in structure(smaller) if name.endswith(".skipped")]
    assert names == ["layers.0.blocks.1.skipped", "layers.1.blocks.0.skipped"]
    assert structure(smaller)[names[0]] == (1,)
    assert state(rebuild(tiny("swin"), structure(smaller))).keys() == state(smaller).keys()
    assert same_state(rebuild(tiny("swin"), structure(dense)), state(dense))


EVERY = {f"layers.{stage}.blocks.{block}.skipped": [1] for stage in range(2) for block in range(2)}


@pytest.mark.parametrize(
    ("shapes", "why"),
    [
        ({"layers.1.downsample.skipped": [1]}, "SwinTransformer has no group layers.1.downsample.skipped"),
        ({"layers.0.blocks.0.attn.skipped": [1]}, "SwinTransformer has no group layers.0.blocks.0.attn.skipped"),
        ({"layers.0.blocks.0.skipped": [2]}, r"SwinTransformer has no group .* that could take the shape \[2\]"),
        (EVERY, "blocks: shape .0. does not fit into .8."),
    ],
)
def test_a_checkpoint_cannot_remove_modules_that_are_not_blocks(
    shapes: dict[str, Any], why: str, tmp_path: Path
) -> None:
    save(tiny("swin").float(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vitprune"]["structure"] = shapes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=why):
        load(tmp_path)


def test_blocks_are_scored_by_removal_and_pruned_one_at_a_time(swin: nn.Module) -> None:
    (group,), calibration = find_groups(swin, ["block"]), batches(swin)
    result = score(swin, [group], "kl-literal", calibration)["blocks"]
    assert torch.equal(score(swin, [group], "kl-exact", calibration)["blocks"], result)
    for index, path in enumerate(paths(swin)):
        expected = sum(kl(predict(swin, x), predict(giving_back(swin, [path]), x)) for x, _ in calibration)
        assert float(result[2 * index]) == pytest.approx(expected, rel=1e-9)
        assert result[2 * index + 1] == float("inf")
    with pytest.raises(
        BadInput, match=r"^blocks: blocks that are removed with all their layers can be scored only by kl-literal$"
    ):
        score(swin, [group], "kl-fisher", calibration)
    pruned = prune(swin, "upvits-blocks", sparsity=0.5, calibration=calibration, example_input=images(swin)).model
    first = paths(swin)[int(result[::2].argmin())]
    second = score(skipping(swin, [first]), find_groups(skipping(swin, [first]), ["block"]), "kl-literal", calibration)
    remaining = [path for path in paths(swin) if path != first]
    remaining.pop(int(second["blocks"][::2].argmin()))
    assert paths(pruned) == remaining


@pytest.mark.parametrize("name", ["swin", "pvt"])
def test_units_of_a_model_with_removed_blocks_are_scored_exactly(name: str) -> None:
    model = tiny(name)
    smaller, calibration = skipping(model, paths(model)[1:2]), batches(model, 1, 2)
    groups = [*find_groups(smaller, ["block"]), *find_groups(smaller, ["ffn"])[:1]]
    exact, literal = (score(smaller, groups, criterion, calibration) for criterion in ("kl-exact", "kl-literal"))
    assert exact.keys() == literal.keys()
    for group in groups:
        torch.testing.assert_close(exact[group.name], literal[group.name], rtol=1e-6, atol=1e-12)


def test_the_last_block_is_not_removed(swin: nn.Module) -> None:
    *removed, last = paths(swin)
    smaller = skipping(swin, removed)
    (group,) = find_groups(smaller, ["block"])
    assert group.sublayers == ((last,), (last,))
    assert score(smaller, [group], "kl-exact", batches(swin))["blocks"].tolist() == [float("inf")] * 2
    with pytest.raises(BadInput, match=r"^blocks: all 2 units would be removed; keep at least one"):
        skipping(smaller, [last])
    pruned = prune(smaller, "upvits-blocks", sparsity=0.9, calibration=batches(swin)).model
    assert same_state(pruned, state(smaller))


@pytest.mark.parametrize(("name", "what"), [("swin", "macs"), ("pvt", "params")])
def test_block_removal_reaches_a_cost_target(name: str, what: str) -> None:
    model = tiny(name)
    pruned = prune(model, "upvits-blocks", calibration=batches(model, 1, 2), target={what: 0.75}).model
    share = cost(pruned, what) / cost(model, what)
    assert len(paths(pruned)) < len(paths(model))
    assert share <= 0.75


def test_a_model_with_removed_blocks_exports_to_onnx(swin: nn.Module, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from vitprune.models.export import export_onnx, export_timm

    model = skipping(swin.float(), ["layers.0.blocks.1"])
    assert export_onnx(model, tmp_path / "model.onnx", images(model))["max_abs_diff"] < 1e-4
    assert export_timm(model, tmp_path / "timm", images(model)) == {"loads_plain_timm": False, "max_abs_diff": 0.0}


def test_removing_half_of_a_block_is_refused_and_costs_count_a_block_once(swin: nn.Module) -> None:
    (group,) = find_groups(swin, ["block"])
    with pytest.raises(BadInput, match=r"^blocks: half of a block would be removed; remove both units"):
        shrink(swin, [group], {"blocks": mask_without(group, 1)})
    weights, macs = group_costs(swin, [group], images(swin))["blocks"]
    assert weights == sum(p.numel() for path in paths(swin) for p in swin.get_submodule(path).parameters())
    assert 0 < macs < cost(swin, "macs")
    assert mask_facts([group], mask_of(group, ["layers.1.blocks.0"]))["removed_blocks"] == ["layers.1.blocks.0"]


class Nested(nn.Module):
    """A block within a block; on request, the model reads a number from the last one."""

    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.reads, self.pretrained_cfg = reads, {"input_size": (3, 4, 6)}
        self.blocks = nn.ModuleList([Outer(), Outer()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x * len(self.blocks[1].inner) if self.reads else x


class Outer(nn.Module):
    """Adds a branch that contains blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.ModuleList([Inner(), nn.Linear(6, 6)]), Mlp(6, 8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(self.inner[1](self.inner[0](x)))


class Inner(Mlp):
    """A residual MLP."""

    def __init__(self) -> None:
        super().__init__(6, 8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def test_only_the_inner_blocks_of_nested_blocks_are_removable() -> None:
    model = Nested(reads=False)
    assert paths(model) == ["blocks.0.inner.0", "blocks.1.inner.0"]
    assert paths(skipping(model, ["blocks.0.inner.0"])) == ["blocks.1.inner.0"]


def test_a_model_that_does_not_run_without_its_blocks_is_refused() -> None:
    model = Nested(reads=True)
    for block in model.blocks:
        block.inner[0] = nn.Identity()
    with pytest.raises(BadInput, match=r"^Nested: without its blocks it does not run as before \(.* 'inner'"):
        find_groups(model, ["block"])


GONE = {
    "swin": ["layers.0.blocks.1", "layers.1.blocks.0"],
    "convnext_atto": ["stages.1.blocks.0", "stages.2.blocks.1", "stages.3.blocks.0"],
    "beit_base_patch16_224": ["blocks.1"],
}


@pytest.mark.parametrize("name", GONE)
def test_timm_feature_interfaces_with_removed_blocks(name: str) -> None:
    model = (tiny(name) if name in ZOO else small(name)).eval()
    smaller, slow, x = skipping(model, GONE[name]), giving_back(model, GONE[name]), noise(model)
    with torch.no_grad():
        assert torch.equal(smaller.forward_features(x), slow.forward_features(x))
        last, result = smaller.forward_intermediates(x)
        expected_last, expected = slow.forward_intermediates(x)
        features = FeatureGetterNet(smaller, out_indices=(0, 1))
        given = features(x)
    assert torch.equal(last, expected_last)
    assert len(result) == len(expected) > 1
    assert all(torch.equal(*pair) for pair in zip(result, expected, strict=True))
    assert [value.shape[1] for value in given] == features.feature_info.channels()
    assert all(torch.equal(*pair) for pair in zip(given, expected[:2], strict=True))


def test_features_only_and_set_input_size_with_removed_blocks() -> None:
    args = SMALL["convnext_atto"] | {"features_only": True, "out_indices": (1, 3)}
    features = redrawn(timm.create_model("convnext_atto", **args), 0).eval()
    slow = giving_back(features, ["stages_2.blocks.1"])
    features.set_submodule("stages_2.blocks.1", IdentityBlock())
    for result, expected in zip(features(noise(features)), slow(noise(features)), strict=True):
        assert torch.equal(result, expected)
    swin = tiny("swin").float()
    smaller = skipping(swin, ["layers.0.blocks.1"])
    slow = giving_back(swin, ["layers.0.blocks.1"])
    for model in (smaller, slow):
        model.set_input_size((64, 64), window_size=(4, 4))
    assert smaller.layers[0].blocks[0].input_resolution == (16, 16)
    assert torch.equal(predict(smaller, noise(swin, 64)), predict(slow, noise(swin, 64)))


def test_blocks_that_end_with_an_activation_are_proven() -> None:
    small = {"layers": (3, 1, 1, 1), "channels": (16, 16, 24, 24)}
    assert [result.verdict for result in check("resnet50", ["block"], [0.5], small)] == ["proven"]
