"""Rules for single groups and widths in multiples, through a plan: every scope, targets, cycles, params.yaml."""

from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

from tests.support.model_zoo import VIT, batches, tiny
from tests.support.plans import plan_for
from vitprune import METHODS, BadInput, count, find_groups, prune, save
from vitprune.config.params import Params, load_params
from vitprune.config.targets import Rule
from vitprune.criteria import magnitude as by_weights
from vitprune.data import example_input
from vitprune.models.weights import read_weights, write_weights
from vitprune.pipeline import mask_stage
from vitprune.pruning.cycle_masks import cycle_state, select_masks
from vitprune.pruning.methods import Method
from vitprune.pruning.plan import plan_of
from vitprune.pruning.prune_cycles import Cycle, prune_cycles

ROOT = Path(__file__).parents[2]
SCOPES = {
    "weight": "global",
    "ffn": "layer",
    "attention": "head",
    "head": "layer",
    "residual": "layer",
    "block": "layer",
}


@pytest.fixture(autouse=True)
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register a method that draws random scores for units of every kind."""
    monkeypatch.setitem(
        METHODS, "drawn", Method(by_weights.random, SCOPES, ("ffn", "attention"), True, "for these tests")
    )


def cut(name: str, sparsity: object, **settings: object) -> tuple[nn.Module, Cycle]:
    """Return a tiny model after one cycle of the method `drawn`."""
    model = tiny(name)
    (cycle,) = prune_cycles(model, plan_for("drawn", sparsity, **settings), ())
    return model, cycle


def removed_fractions(cycle: Cycle) -> dict[str, float]:
    return {name: 1 - float(mask.double().mean()) for name, mask in cycle.masks.items()}


@pytest.mark.parametrize("scope", ["layer", "global", "isomorphic", "macs"])
def test_rules_apply_in_every_scope_and_the_first_match_is_used(scope: str) -> None:
    rules = [
        {"match": r"layers\.0\.blocks\.0\..*", "ignore": True},
        {"match": r"layers\.0\.blocks\.\d\.mlp", "sparsity": 0.25},
        {"match": r"layers\.1\.blocks\.0\.mlp", "min_sparsity": 0.5, "max_sparsity": 0.625},
        {"match": r".*\.mlp", "max_sparsity": 0.375},
    ]
    _, cycle = cut("swin", {"ffn": 0.45}, scope=scope, rules=rules)
    result = removed_fractions(cycle)
    assert result["layers.0.blocks.0.mlp"] == 0  # the second and the fourth rule match as well
    assert result["layers.0.blocks.1.mlp"] == 0.25
    assert 0.5 <= result["layers.1.blocks.0.mlp"] <= 0.625
    assert result["layers.1.blocks.1.mlp"] <= 0.375
    pooled = 192 * (result["layers.1.blocks.0.mlp"] + result["layers.1.blocks.1.mlp"])
    if scope in ("global", "isomorphic", "macs"):
        assert pooled == pytest.approx(0.45 * 384, abs=1)
    if scope == "layer":
        assert pooled == pytest.approx(192 * (0.5 + 0.375), abs=1)


@pytest.mark.parametrize("scope", ["layer", "global", "module", "isomorphic"])
def test_rules_apply_to_single_weights(scope: str) -> None:
    rules = [
        {"match": r".*\.attn\.qkv\.weight", "ignore": True},
        {"match": r"blocks\.0\.mlp\..*", "sparsity": 0.75},
        {"match": r"blocks\.1\.mlp\.fc1\.weight", "min_sparsity": 0.7},
        {"match": r"blocks\.1\.mlp\.fc2\.weight", "max_sparsity": 0.2},
    ]
    model, cycle = cut("vit", {"weight": 0.5}, scope=scope, rules=rules)
    result = removed_fractions(cycle)
    assert result["blocks.0.attn.qkv.weight"] == result["blocks.1.attn.qkv.weight"] == 0
    assert result["blocks.0.mlp.fc1.weight"] == result["blocks.0.mlp.fc2.weight"] == 0.75
    assert result["blocks.1.mlp.fc1.weight"] >= 0.7 - 1e-9
    assert result["blocks.1.mlp.fc2.weight"] <= 0.2 + 1e-9
    for name, share in result.items():
        assert int((model.get_parameter(name) == 0).sum()) == round(share * model.get_parameter(name).numel())
    if scope == "global":
        free = ["blocks.0.attn.proj.weight", "blocks.1.attn.proj.weight"]
        free += ["blocks.1.mlp.fc1.weight", "blocks.1.mlp.fc2.weight"]
        sizes = {name: cycle.masks[name].numel() for name in free}
        assert sum(result[name] * sizes[name] for name in free) == pytest.approx(0.5 * sum(sizes.values()), abs=1)


def test_n_of_m_does_not_change_the_layers_that_a_rule_ignores() -> None:
    model = tiny("vit")
    pruned = prune(model, "n:m", rules=[{"match": r".*\.fc1\.weight", "ignore": True}]).model
    zeros = {name: int((p == 0).sum()) / p.numel() for name, p in pruned.named_parameters() if p.dim() == 2}
    assert [zeros[f"blocks.0.mlp.{layer}.weight"] for layer in ("fc1", "fc2")] == [0, 0.5]
    with pytest.raises(
        BadInput, match=r"^prune.rules: an N:M scope removes the same fraction of every layer; rules can only ig"
    ):
        prune(model, "n:m", rules=[{"match": r".*", "sparsity": 0.3}])


def test_channels_of_every_head_keep_their_bounds() -> None:
    rules = [{"match": r"blocks\.0\.attn", "max_sparsity": 0.25}, {"match": r"blocks\.1\.attn", "sparsity": 0.5}]
    model, _ = cut("vit", {"attention": 0.8, "ffn": 0.5}, rules=rules)
    assert [block.attn.head_dim for block in model.blocks] == [12, 8]


def test_blocks_keep_the_bounds_of_their_group() -> None:
    for rule, blocks in (({"ignore": True}, 3), ({"max_sparsity": 0.4}, 2), ({"sparsity": 0.67}, 1)):
        model = tiny("odd")
        rules = [{"match": "blocks", **rule}]
        list(prune_cycles(model, plan_for("upvits-blocks", 0.67, rules=rules), batches(model, 1)))
        assert len(model.blocks) == blocks
    model = tiny("odd")
    plan = plan_for("drawn", {"block": 0.01, "ffn": 0.5}, rules=[{"match": "blocks", "min_sparsity": 0.6}])
    (cycle,) = prune_cycles(model, plan, ())
    assert len(model.blocks) == 1
    assert cycle.target["block"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("scope", ["layer", "global", "macs"])
def test_rules_apply_in_every_cycle_and_masks_are_cumulative(scope: str) -> None:
    rules = [
        {"match": r"blocks\.0\.mlp", "sparsity": 0.75},
        {"match": r"blocks\.1\.mlp", "min_sparsity": 0.25, "max_sparsity": 0.5},
        {"match": r"blocks\.0\.attn", "ignore": True},
    ]
    model, seen, before = tiny("vit"), [], None
    plan = plan_for("drawn", 0.5, scope, cycles=3, schedule="linear", rules=rules, round_to=4)
    for cycle in prune_cycles(model, plan, ()):
        assert before is None or all(not bool((m & ~before[n]).any()) for n, m in cycle.masks.items())
        before = cycle.masks
        seen.append(
            [round(removed_fractions(cycle)[name], 4) for name in ("blocks.0.mlp", "blocks.1.mlp", "blocks.0.attn")]
        )
    assert [first for first, _, _ in seen] == [0.25, 0.5, 0.75]
    assert all(least <= second <= 0.5 for (_, second, _), least in zip(seen, (1 / 12, 1 / 6, 1 / 4), strict=True))
    assert [third for _, _, third in seen] == [0, 0, 0]
    assert model.blocks[0].mlp.fc1.out_features == 48
    assert all(width % 4 == 0 for block in model.blocks for width in (block.mlp.fc1.out_features, block.attn.head_dim))


@pytest.mark.parametrize("sparsity", [None, {"ffn": 1.0, "attention": 0.5}])
@pytest.mark.parametrize("scope", [None, "global", "macs"])
def test_a_target_is_reached_under_rules_and_multiples(scope: str | None, sparsity: dict | None) -> None:
    if scope == "macs" and sparsity:
        return
    rules = [{"match": r"blocks\.0\.mlp", "sparsity": 0.25}, {"match": r"blocks\.1\.attn", "max_sparsity": 0.5}]
    model, full = tiny("vit"), count(tiny("vit"), example_input(tiny("vit"), 1)).macs
    (cycle,) = prune_cycles(
        model, plan_for("drawn", sparsity, scope, target={"macs": 0.7}, rules=rules, round_to=4), ()
    )
    reached = count(model, example_input(model, 1)).macs / full
    record = cycle.cost["macs"]
    assert record["reached"] == reached <= 0.7
    assert ("why" in record) == (reached < 0.7 * 0.98)
    assert [model.blocks[0].mlp.fc1.out_features, removed_fractions(cycle)["blocks.0.mlp"]] == [144, 0.25]
    assert model.blocks[1].attn.head_dim >= 8
    assert all(width % 4 == 0 for block in model.blocks for width in (block.mlp.fc1.out_features, block.attn.head_dim))


@pytest.mark.parametrize("name", ["vit", "swin", "pvt", "odd"])
@pytest.mark.parametrize("scope", ["layer", "global", "macs"])
def test_one_multiple_for_all_widths(name: str, scope: str) -> None:
    model, cycle = cut(name, 0.4, scope=scope, round_to=8)
    for group in cycle.groups:
        stay = {int(row.sum()) for row in cycle.masks[group.name].view(-1, group.shape[-1])}
        units = group.shape[-1]
        assert len(stay) == 1
        assert stay == {units} if units < 8 else min(stay) % 8 == 0 and min(stay) >= 8
    assert bool(model(example_input(model, 1).double()).isfinite().all())


def test_a_multiple_per_kind() -> None:
    model, _ = cut("vit", {"ffn": 0.3, "attention": 0.3, "residual": 0.3}, round_to={"ffn": 64, "residual": 16})
    assert [block.mlp.fc1.out_features for block in model.blocks] == [128, 128]
    assert [block.attn.head_dim for block in model.blocks] == [11, 11]  # 0.7 of 16
    assert model.embed_dim == 32


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (
            {"round_to": {"weight": 8}},
            r"^prune.round_to.weight: is not among the widths that are pruned \(ffn, attention\)$",
        ),
        ({"round_to": {"residual": 8}}, r"^prune.round_to.residual: is not among the widths that are pruned"),
        ({"round_to": 0}, r"^prune.round_to: Input should be greater than or equal to 1, got 0$"),
        (
            {"round_to": {"ffn": 2.5}},
            r"^prune.round_to.ffn: Input should be a valid integer, got a number with a fractional part, got 2.5$",
        ),
        (
            {"rules": [{"match": "mlp", "ignore": True}]},
            r"^prune.rules.0: 'mlp' matches the full name of no group of kind ffn, attention, such as blocks.0.mlp; ",
        ),
        (
            {"rules": [{"match": ".*", "ignore": True}, {"match": "x", "sparsity": 0.1}]},
            r"^prune.rules.1: 'x' matches the",
        ),
        (
            {"rules": [{"match": "blocks[", "ignore": True}]},
            r"^prune.rules.0.match: not a regular expression \(unterminated .*got 'blocks\['$",
        ),
        ({"rules": [{"match": ".*"}]}, r"^prune.rules.0: give ignore: true, or sparsity, or min_sparsity"),
        ({"rules": [{"match": ".*", "ignore": True, "sparsity": 0.5}]}, r"^prune.rules.0: give ignore"),
        (
            {"rules": [{"match": ".*", "least": 0.5}]},
            r"^prune.rules.0.least: unknown key; remove it or correct its name$",
        ),
        ({"rules": [{"match": ".*", "sparsity": 1.5}]}, r"^prune.rules.0.sparsity: Input should be less than 1"),
        (
            {"rules": [{"match": ".*", "min_sparsity": 0.5, "max_sparsity": 0.4}]},
            r"^prune.rules.0: min_sparsity is above max_sparsity; exchange them",
        ),
        (
            {"rules": [{"match": r".*\.attn", "min_sparsity": 0.1, "max_sparsity": 0.4}], "round_to": 8},
            r"^prune.rules.0: '.*' allows no number of the 16 units of blocks.0.attn in multiples of 8; widen",
        ),
    ],
)
def test_invalid_rules_and_widths_are_refused(vit: nn.Module, settings: dict, why: str) -> None:
    with pytest.raises(BadInput, match=why) as refused:
        prune(vit, "drawn", sparsity=0.5, **settings)
    assert "\n" not in str(refused.value)


def test_round_to_is_refused_for_kinds_without_width(vit: nn.Module) -> None:
    with pytest.raises(BadInput, match=r"^prune.round_to 8: of weight none is a width; set it to null$"):
        prune(vit, "magnitude", sparsity=0.5, round_to=8)


def test_upvits_rescores_under_rules_and_multiples(vit: nn.Module) -> None:
    rules = [{"match": r"blocks\.1\.mlp", "sparsity": 0.25}, {"match": r"blocks\.0\.attn", "ignore": True}]
    pruned = prune(vit, "upvits", sparsity=0.5, calibration=batches(vit, 2, 4), rules=rules, round_to={"ffn": 32}).model
    assert [block.mlp.fc1.out_features for block in pruned.blocks] == [96, 160]  # of 144 the larger of 128 and 160
    assert [block.attn.head_dim for block in pruned.blocks] == [16, 8]


@pytest.mark.parametrize("method", ["unit-obs", "corp", "upvits-global"])
def test_methods_with_an_update_support_rules_and_multiples(vit: nn.Module, method: str) -> None:
    rules = [{"match": r"blocks\.1\.mlp", "max_sparsity": 0.125}]
    pruned = prune(vit, method, sparsity={"ffn": 0.4}, calibration=batches(vit, 2, 8), rules=rules, round_to=8).model
    widths = [block.mlp.fc1.out_features for block in pruned.blocks]
    assert widths[1] >= 168
    assert all(width % 8 == 0 and width < 192 for width in widths[:1])


def test_params_yaml_gives_the_same_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = [{"match": r"blocks\.0\..*", "ignore": True}, {"match": r".*\.mlp", "min_sparsity": 0.5}]
    prune_ = {"method": "channel-magnitude", "sparsity": 0.3, "kinds": ["ffn"], "round_to": {"ffn": 16}, "rules": rules}
    settings = {"dataset": {"source": "digits"}, "dense": {"start": "train"}, "prune": prune_}
    settings |= {"model": {"name": "vit_tiny_patch16_224", "args": VIT}}
    params = Params.model_validate(settings)
    plan = plan_of(params)
    assert plan.round_to == {"ffn": 16}
    assert plan.config.rules == (Rule(match=r"blocks\.0\..*", ignore=True), Rule(match=r".*\.mlp", min_sparsity=0.5))
    monkeypatch.chdir(tmp_path)
    dense = tiny("vit").float()
    save(dense, tmp_path / "out/dense")
    groups = find_groups(dense, ["ffn"])
    scores = by_weights.magnitude(dense, groups, (), plan.context(0)).scores
    write_weights(scores, tmp_path / "out/score/scores.safetensors")
    mask_stage.run(params)
    masks: dict[str, Tensor] = read_weights(tmp_path / "out/mask/masks.safetensors")
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"blocks.0.mlp": 192, "blocks.1.mlp": 96}
    selected = plan_for("channel-magnitude", {"ffn": 0.3}, rules=rules, round_to=16)
    alike = select_masks(scores, selected, {"ffn": 0.3}, cycle_state(dense, selected))
    assert all(torch.equal(alike[name], mask) for name, mask in masks.items())


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("round_to", 0, "prune.round_to: "),
        ("round_to", {"ffn": 0}, "prune.round_to.ffn: "),
        ("round_to", {"mlp": 8}, "prune.round_to.mlp: "),
        ("rules", [{"match": "("}], "prune.rules.0.match: not a regular expression"),
        ("rules", [{"match": ".*", "keep": True}], "prune.rules.0.keep: unknown key; remove it or correct its name"),
        ("rules", [{"ignore": True}], "prune.rules.0.match: Field required"),
        ("rules", [{"match": ".*", "ignore": False}], "prune.rules.0.ignore: Input should be True"),
        ("target", {"macs": "half"}, "prune.target.macs: 'half' is no quantity; give a fraction, a whole"),
        ("target", {"macs": "600T"}, "prune.target.macs: '600T' is no quantity"),
        ("target", {"latency_ms": 0}, "prune.target.latency_ms: Input should be greater than 0"),
        ("target", {"latency": 20}, "prune.target.latency: Input should be less than 1"),
    ],
)
def test_errors_in_params_yaml_are_named(tmp_path: Path, key: str, value: object, why: str) -> None:
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    raw["prune"] |= {"sparsity": None, key: value}
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(BadInput) as error:
        load_params(path)
    assert str(error.value).startswith(f"{path}: {why}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", ["n:m", "obc", "ovit", "woodfisher", "magnitude-obs"])
def test_layers_that_do_not_fit_an_n_of_m_pattern_are_excluded_by_a_rule(method: str) -> None:
    model = tiny("vit")
    dense = {name: parameter.clone() for name, parameter in model.named_parameters()}
    settings = {"scope": "3:64", "calibration": batches(model)}  # rows of 192 weights in fc2, of 48 in other layers
    with pytest.raises(BadInput, match=r"^blocks.0.\S+: rows of 48 weights cannot be divided into runs of 64; exclude"):
        prune(model, method, **settings)
    result = prune(model, method, **settings, rules=[{"match": r".*\.(qkv|proj|fc1)\.weight", "ignore": True}])
    for name, mask in result.masks.items():
        weight = result.model.get_parameter(name)
        if "fc2" in name:
            assert bool((weight.view(48, -1, 64).count_nonzero(dim=2) <= 3).all())
            assert int(mask.sum()) == 3 * mask.numel() // 64
        else:
            assert bool(mask.all())
            old, new = (value.flatten().sort().values for value in (dense[name], weight))
            assert torch.equal(old, new)  # channels may be in another order
