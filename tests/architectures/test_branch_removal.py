"""Removal of attention and MLP branches alone: detection, equality with skipping, scores, saving, cost."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.support.model_zoo import SMALL, batches, cost, images, predict, redrawn, same_state, state, tiny
from tests.support.other_models import make_model
from tests.support.reference_kl import kl
from vitprune import BadInput, ScoreConfig, export_onnx, find_groups, load, prune, save, score, shrink, zero
from vitprune.architectures import structure
from vitprune.architectures.branch_removal import ZeroBranch
from vitprune.criteria import ScoringContext
from vitprune.criteria.kl.fisher import fisher_kl
from vitprune.evaluation.check_model import check, random_odd_masks, randomize_parameters
from vitprune.evaluation.check_removal import check_removal
from vitprune.evaluation.cost import group_costs
from vitprune.groups import Group
from vitprune.pipeline.artifacts import mask_facts
from vitprune.runtime.input_size import input_size
from vitprune.runtime.outputs import main_tensor, return_logits

VIT_BRANCHES = [(f"blocks.{index}.{leaf}") for index in range(2) for leaf in ("attn", "mlp")]


def branches(model: nn.Module) -> Group:
    (group,) = find_groups(model, ["branch"])
    assert (group.name, group.kind, group.shape) == ("branches", "branch", (len(group.sublayers),))
    return group


def small(name: str) -> nn.Module:
    return redrawn(timm.create_model(name, **SMALL[name] | {"num_classes": 7}), 0)


def without(model: nn.Module, *units: int) -> nn.Module:
    """Return a copy without some branches."""
    group = branches(model)
    return shrink(
        copy.deepcopy(model), [group], {group.name: torch.tensor([n not in units for n in range(group.units)])}
    )


def silenced(model: nn.Module, *paths: str) -> nn.Module:
    """Return a copy in which the modules at these paths return zeros; no parameter is removed."""
    model = copy.deepcopy(model)
    for path in paths:
        model.get_submodule(path).register_forward_hook(lambda module, given, output: torch.zeros_like(output))
    return model


EXPECTED = {
    "vit": [("attn", "norm1"), ("mlp", "norm2")],
    "extra": [("attn", "norm1", "ls1"), ("mlp", "norm2", "ls2")],  # with layer scale
    "swin": [("attn", "norm1"), ("mlp", "norm2")],
    "swinv2_tiny_window8_256": [("norm1", "attn"), ("norm2", "mlp")],  # the norm is the last module of the branch
    "xcit_nano_12_p16_224": [("attn", "norm1"), ("local_mp", "norm3"), ("mlp", "norm2")],
    "convnext_atto": [("mlp", "conv_dw", "norm")],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_branches_of_the_first_block(name: str) -> None:
    group = branches(tiny(name) if name in ("vit", "extra", "swin") else small(name))
    first = group.sublayers[0][0].rpartition(".")[0]
    found = [paths for paths in group.sublayers if paths[0].startswith(f"{first}.")]
    assert [tuple(path.removeprefix(f"{first}.") for path in paths) for paths in found] == EXPECTED[name]


def test_a_model_without_a_separate_branch_is_refused() -> None:
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    for name, changes in (("vit_small_patch16_18x2_224", shape), ("resnext50_32x4d", {"layers": (1, 1, 1, 1)})):
        with pytest.raises(BadInput, match=r"no module of its blocks is added alone to what the block was given"):
            find_groups(timm.create_model(name, **changes), ["branch"])
    with pytest.raises(BadInput, match=r"^Linear: there is no block in it, so it has no groups of kind 'branch'"):
        find_groups(nn.Linear(3, 3), ["branch"])


class Parallel(nn.Module):
    """Blocks (x + f(x)) + g(x) or x + (f(x) + g(x)); the output of one branch or of both may be used a second time."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.blocks, self.form = nn.ModuleList([ParallelBlock(form) for _ in range(2)]), form
        self.image_size, self.head = 4, nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = images.flatten(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=1))


class WithSize(nn.Module):
    """A layer that also returns a size, as the attention of MViT."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        return self.layer(x), (x.shape[1], 1)


class ParallelBlock(nn.Module):
    """A block of Parallel."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.f, self.g, self.form = nn.Linear(4, 4), nn.Linear(4, 4), form
        self.sized = WithSize() if form == "sized" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.sized is not None:
            y, (length, _) = self.sized(x)
            return x + y + self.g(x)[:, :length]
        if self.form == "one by one":
            return x + self.f(x) + self.g(x)
        if self.form == "together":
            return x + (self.f(x) + self.g(x))
        if self.form == "read twice":
            y = self.f(x)
            return x + y + self.g(y)
        y = x + self.f(x)
        return y.relu() + self.g(y)  # one operand of the second sum is the stream after an activation


def test_parallel_branches_are_removed_correctly_or_refused() -> None:
    assert list(branches(Parallel("one by one")).sublayers) == [
        (f"blocks.{index}.{leaf}",) for index in range(2) for leaf in "fg"
    ]
    with pytest.raises(BadInput, match=r"^Parallel: no module of its blocks"):
        branches(Parallel("together"))
    assert list(branches(Parallel("read twice")).sublayers) == [(f"blocks.{n}.g",) for n in range(2)]
    assert list(branches(Parallel("relu")).sublayers) == [(f"blocks.{n}.{leaf}",) for n in range(2) for leaf in "fg"]
    assert [path for (path, *_) in branches(Parallel("sized")).sublayers][:2] == ["blocks.0.sized.layer", "blocks.0.g"]
    model = randomize_parameters(Parallel("one by one"))
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert predict(without(model, 0, 3), x).equal(predict(silenced(model, "blocks.0.f", "blocks.1.g"), x))


@pytest.mark.parametrize("name", ["vit", "extra", "distilled", "swin", "pvt"])
def test_a_removed_branch_equals_one_that_returns_zeros(name: str) -> None:
    model, x = tiny(name), images(tiny(name))
    for unit, paths in enumerate(branches(model).sublayers):
        pruned = without(model, unit)
        torch.testing.assert_close(predict(pruned, x), predict(silenced(model, paths[0]), x), rtol=0, atol=1e-12)
        assert not predict(pruned, x).allclose(predict(model, x))


def test_a_removed_branch_equals_a_manual_forward_pass_without_it(vit: nn.Module) -> None:
    x = images(vit)
    first, second = vit.blocks
    tokens = vit._pos_embed(vit.patch_embed(x))
    tokens = tokens + first.mlp(first.norm2(tokens))
    tokens = tokens + second.attn(second.norm1(tokens))
    expected = vit.head(vit.norm(tokens)[:, 0])
    torch.testing.assert_close(predict(without(vit, 0, 3), x), expected.detach())


@pytest.mark.parametrize("name", [*list(SMALL)[:8], "maxvit_pico_rw_256", "vit_relpos_small_patch16_224"])
def test_branches_of_timm_models_are_proven(name: str) -> None:
    assert {(result.verdict, result.why) for result in check(name, ["branch"], [0.5], SMALL[name])} == {("proven", "")}


@pytest.mark.parametrize("name", ["vit", "dinov2", "swin", "swinv2", "siglip2", "torchvision vit", "open_clip", "detr"])
def test_branches_of_other_libraries_are_proven(name: str) -> None:
    model = randomize_parameters(make_model(name))
    groups, x = [branches(model)], torch.randn(2, *input_size(model), dtype=torch.float64)
    assert check_removal(model, groups, random_odd_masks(groups, 0.5), x).failures == ()


def test_a_removed_branch_costs_nothing(vit: nn.Module) -> None:
    group = branches(vit)
    tokens, width = 17, 48
    attention = {"params": 2 * width + width * 3 * width + 3 * width + width * width + width}
    attention["macs"] = tokens * width * 4 * width + 2 * tokens**2 * width
    mlp = {"params": 2 * width + 2 * 4 * width * width + 5 * width, "macs": 2 * tokens * width * 4 * width}
    for unit, expected in enumerate((attention, mlp)):
        pruned = without(vit, unit)
        for what, value in expected.items():
            assert cost(vit, what) - cost(pruned, what) == value
    weights, macs = group_costs(vit, [group], images(vit))["branches"]
    assert weights == 2 * (attention["params"] + mlp["params"])
    assert macs == 2 * (tokens * width * 4 * width + mlp["macs"])  # of layers


@pytest.mark.parametrize("name", ["vit", "extra", "swin", "pvt"])
def test_a_model_without_branches_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model = tiny(name, dtype=torch.float32)
    pruned, x = without(model, 1, 2), images(model)
    groups = find_groups(pruned, ["ffn"])
    shrink(pruned, groups, {group.name: torch.arange(group.units) % 4 > 0 for group in groups})
    save(pruned, tmp_path)
    loaded = load(tmp_path)
    paths = [branches(model).sublayers[unit][0] for unit in (1, 2)]
    assert {entry for entry in structure(loaded) if entry.endswith(".removed")} == {f"{path}.removed" for path in paths}
    assert all(type(loaded.get_submodule(path)) is ZeroBranch for path in paths)
    assert same_state(loaded, state(pruned))
    assert predict(loaded, x).equal(predict(pruned, x))
    assert branches(loaded).units == branches(model).units - 2
    with pytest.raises(RuntimeError):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


def test_blocks_and_branches_are_removed_one_after_the_other(vit: nn.Module, tmp_path: Path) -> None:
    deep = redrawn(timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=4,
                                     num_heads=3, num_classes=7), 0)  # fmt: skip
    pruned = without(deep, 3)
    (blocks,) = find_groups(pruned, ["block"])
    shrink(pruned, [blocks], {"blocks": torch.tensor([1, 1, 0, 0, 1, 1, 1, 1]).bool()})
    assert len(pruned.blocks) == 3
    again = without(pruned, 0)
    save(again, tmp_path)
    x = images(deep)
    assert predict(load(tmp_path), x).equal(predict(again, x))


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ({"blocks.0.removed": [1]}, "VisionTransformer has no group blocks.0.removed"),
        ({"blocks.0.attn.proj.removed": [1]}, "VisionTransformer has no group blocks.0.attn.proj.removed"),
        ({"blocks.0.attn.removed": [2]}, r"VisionTransformer has no group .* that could take the shape \[2\]"),
        ({f"{path}.removed": [1] for path in VIT_BRANCHES}, r"branches: shape \[0\] does not fit into \[4\]"),
    ],
)
def test_a_checkpoint_cannot_remove_modules_that_are_no_branches(
    entries: dict[str, Any], why: str, tmp_path: Path
) -> None:
    save(tiny("vit", dtype=torch.float32), tmp_path)
    path = tmp_path / "config.json"
    listed = ", ".join(f'"{name}": {shape}' for name, shape in entries.items())
    path.write_text(path.read_text().replace('"structure": {', f'"structure": {{{listed},'))
    with pytest.raises(BadInput, match=f"config.json: vitprune.structure: .*{why}"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_a_model_without_branches_is_exported_to_onnx(name: str, tmp_path: Path) -> None:
    model = tiny(name, dtype=torch.float32)
    pruned = without(model, 0, 3)
    assert export_onnx(pruned, tmp_path / "model.onnx", images(model))["max_abs_diff"] < 1e-4


def test_a_swin_without_branches_accepts_another_image_size() -> None:
    pruned = without(tiny("swin"), 0, 3)
    pruned.set_input_size(img_size=(64, 64), window_size=(4, 4))
    assert predict(pruned, torch.randn(1, 3, 64, 64, dtype=torch.float64)).shape == (1, 7)


def test_scores_are_divergences_without_the_branch(vit: nn.Module) -> None:
    given, group = batches(vit), branches(vit)
    expected = [
        sum(kl(predict(vit, x), predict(silenced(vit, paths[0]), x)) for x, _ in given) for paths in group.sublayers
    ]
    for criterion in ("kl-literal", "kl-exact"):
        scores = score(vit, [group], criterion, given)["branches"]
        torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64).view(-1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["vit", "swin", "hf"])
def test_second_order_scores_are_those_of_a_small_gate(name: str) -> None:
    model = randomize_parameters(make_model("vit")) if name == "hf" else tiny(name)
    x = torch.randn(3, *input_size(model), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    group, step = branches(model), 1e-3

    with torch.no_grad():
        dense = main_tensor(model(x)).log_softmax(-1)
    return_logits(model)
    scores = fisher_kl(model, [group], [(x, torch.zeros(3))], ScoringContext(ScoreConfig(fisher_directions=1000)))
    for unit, paths in enumerate(group.sublayers):

        def scale(module: nn.Module, given: Any, output: Any) -> Any:
            return ((1 - step) * output[0], *output[1:]) if isinstance(output, tuple) else (1 - step) * output

        handle = model.get_submodule(paths[0]).register_forward_hook(scale)
        with torch.no_grad():
            changed = model(x).log_softmax(-1)
        handle.remove()
        divergence = float((dense.exp() * (dense - changed)).sum()) / step**2
        assert float(scores.scores["branches"][unit]) == pytest.approx(divergence, rel=1e-2)


def test_branches_are_removed_one_by_one_and_scored_again() -> None:
    model = redrawn(timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=3,
                                      num_heads=3, num_classes=7), 0)  # fmt: skip
    given = batches(model)
    result = prune(model, "upvits-blocks", sparsity={"branch": 0.5}, calibration=given)
    left, removed = {paths[0] for paths in branches(model).sublayers}, []
    for _ in range(3):
        losses = {
            path: sum(
                kl(predict(silenced(model, *removed), x), predict(silenced(model, *removed, path), x)) for x, _ in given
            )
            for path in left
        }
        removed.append(min(losses, key=losses.__getitem__))
        left -= {removed[-1]}
    assert {path for path, module in result.model.named_modules() if type(module) is ZeroBranch} == set(removed)
    group = branches(model)
    assert set(mask_facts([group], result.masks)["removed_branches"]) == set(removed)


@pytest.mark.usefixtures("drawn")
def test_branches_and_other_kinds_reach_one_target_in_cycles() -> None:
    model = tiny("swin")
    result = prune(model, "drawn", sparsity={"branch": 0.5, "ffn": 0.5}, target={"macs": 0.6})
    assert 0.4 < result.after.macs / result.before.macs <= 0.6
    assert any(type(module) is ZeroBranch for module in result.model.modules())
    rest = prune(result.model, "drawn", sparsity={"branch": 0.4, "ffn": 0.3})
    assert predict(rest.model, images(model)).shape == (3, 7)


@pytest.mark.usefixtures("drawn")
def test_invalid_uses_are_refused(vit: nn.Module) -> None:
    group = branches(vit)
    with pytest.raises(BadInput, match=r"^prune.sparsity: block and branch remove the same modules; choose one"):
        prune(vit, "drawn", sparsity={"branch": 0.5, "block": 0.5})
    with pytest.raises(BadInput, match=r"^branches: branches cannot be zeroed, they are removed from the model"):
        zero(vit, [group], {"branches": torch.tensor([False, True, True, True])})
    with pytest.raises(BadInput, match=r"^branches: all 4 units would be removed; keep at least one"):
        shrink(vit, [group], {"branches": torch.zeros(4, dtype=torch.bool)})
    with pytest.raises(BadInput, match=r"^branches: the model has no blocks.0.attn, the group is out of date"):
        shrink(timm.create_model("resnet18"), [group], {"branches": torch.tensor([False, True, True, True])})
