"""Adaptive rescoring: against exact selections of made-up scores, of tiny models, and through the library."""

import json

import pytest
import torch
from torch import Tensor, nn

from tests.support.digits_project import ORDER, project_in
from tests.support.model_zoo import batches, tiny
from tests.support.plans import changed, context, plan_for
from vitprune import find_groups, prune
from vitprune.criteria import ScoringContext
from vitprune.criteria.kl.exact import exact_kl
from vitprune.criteria.kl.fisher import fisher_kl
from vitprune.errors import BadInput
from vitprune.pipeline import stages
from vitprune.pruning.prune_cycles import prune_cycles
from vitprune.pruning.rescoring import Rescored, adaptive_rescoring, rescore
from vitprune.pruning.rescoring_posterior import ScorePosterior, selection_errors, units_to_measure
from vitprune.pruning.select import candidate_pools, select

IMAGES = 400


def made_up(units: int = 300, seed: int = 0, noise: float = 0.4, ratio: float = 0.2) -> tuple[Tensor, Tensor]:
    """Return exact and surrogate scores (units, images) with heavy-tailed images and a ratio per unit."""
    source = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source, dtype=torch.float64)

    control = (normal(units, 1) + normal(1, IMAGES) + 0.5 * normal(units, IMAGES)).exp()
    return control * (ratio * normal(units, 1) + noise * normal(units, IMAGES) - 0.1).exp(), control


def rescored(
    measured: Tensor, control: Tensor | None, setting: ScoringContext, surrogate: Tensor, seed: int = 0
) -> Rescored:
    scores = {"a": surrogate}
    order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(seed))
    return adaptive_rescoring(
        scores,
        {"a": "ffn"},
        candidate_pools(scores, 0.5),
        lambda chosen, images: {name: measured[units][:, images] for name, units in chosen.items()},
        None if control is None else (lambda images: control[:, images]),
        order,
        changed(setting, seed=seed),
    )


def overlap(scores: Tensor, exact_scores: Tensor) -> float:
    kept, right = (select({"a": s}, 0.5)["a"] for s in (scores, exact_scores))
    return float((kept & right).sum() / right.sum())


def test_the_expected_overlap_is_calibrated() -> None:
    actual, promised, shares = [], [], []
    for seed in range(8):
        measured, control = made_up(seed=seed)
        result = rescored(measured, control, context(confidence=0.98), control.sum(1), seed)
        actual.append(overlap(result.scores["a"], measured.sum(1)))
        promised.append(result.facts["expected_overlap"])
        shares.append(result.facts["evaluations_share"])
    assert min(promised) >= 0.98
    assert sum(actual) / 8 > 0.98
    assert abs(sum(actual) - sum(promised)) / 8 < 0.012
    assert sum(shares) / 8 < 0.2


@pytest.mark.parametrize("controlled", [True, False])
def test_full_confidence_gives_the_exact_selection(controlled: bool) -> None:
    measured, control = made_up(units=60)
    result = rescored(measured, control if controlled else None, context(confidence=1 - 1e-9), control.sum(1))
    assert overlap(result.scores["a"], measured.sum(1)) == 1
    assert 0 < result.facts["evaluations"] <= 60 * IMAGES


def test_control_scores_reduce_measurements() -> None:
    measured, control = made_up()
    setting = context(confidence=0.98)
    with_it, without = (rescored(measured, c, setting, control.sum(1)).facts["evaluations"] for c in (control, None))
    assert with_it < 0.8 * without


def test_a_wrong_surrogate_is_detected() -> None:
    measured, control = made_up(ratio=1.5)
    before = overlap(control.sum(1), measured.sum(1))
    result = rescored(measured, control, context(confidence=0.98), control.sum(1))
    assert before < 0.8
    assert overlap(result.scores["a"], measured.sum(1)) > 0.95


def test_the_posterior_is_exact_after_all_images() -> None:
    measured, control = made_up(units=20)
    state = ScorePosterior(control.sum(1), torch.zeros(20, dtype=torch.int64), IMAGES)
    mean, deviation = state.posterior()
    torch.testing.assert_close(mean, control.sum(1).log())
    assert deviation.tolist() == pytest.approx([0.5] * 20)
    state.add(torch.arange(12), measured[:12, :50], control[:12, :50])
    some = state.posterior()[1]
    assert bool((some[:12] < some[12:].min()).all())
    state.add(torch.arange(6), measured[:6, 50:], torch.zeros(6, IMAGES - 50))
    mean, deviation = state.posterior()
    assert deviation[:6].tolist() == [0] * 6
    torch.testing.assert_close(state.scores()[:6], measured[:6].sum(1), rtol=1e-12, atol=0)


def test_expected_errors_by_hand() -> None:
    draws = torch.tensor([[0.0, 0, 0, 0], [0, 0, 2, 0], [0, -3, 0, 0], [0, 0, 0, 0]])
    errors = selection_errors(
        torch.tensor([1.0, 3, 2, 4]), torch.ones(4), 2, draws
    )  # 1 and 3 are kept, in two draws 2 and 3
    assert errors.wrong.tolist() == [0, 0.5, 0.5, 0]
    assert errors.overlap == 0.75
    everyone, effort = torch.ones(4, dtype=torch.bool), torch.tensor([1, 0.5, 0.6, 1])
    assert sorted(units_to_measure(errors.wrong, everyone, effort, 0.1).tolist()) == [1, 2]
    assert units_to_measure(errors.wrong, everyone, effort, 0.25).tolist() == [1]  # the cheaper one
    assert units_to_measure(errors.wrong, torch.tensor([True, False, True, True]), effort, 0.25).tolist() == []
    assert selection_errors(torch.ones(4), torch.ones(4), 0, draws).overlap == 1


@pytest.mark.parametrize("scope", ["global", "layer", "head", "isomorphic"])
def test_select_equals_selection_per_candidate_pool(scope: str, vit: nn.Module) -> None:
    groups = find_groups(vit, ["attention"])
    source = torch.Generator().manual_seed(0)
    scores = {group.name: torch.rand(group.shape, generator=source) for group in groups}
    before = select(scores, 0.2, scope, groups)
    for previous in (None, before):
        masks = select(scores, 0.5, scope, groups, previous, 1)
        for pool in candidate_pools(scores, 0.5, scope, groups, previous, 1):
            values = torch.cat([scores[name].flatten()[units] for name, units in pool.members])
            kept = torch.cat([masks[name].flatten()[units] for name, units in pool.members])
            assert int((~kept).sum()) == pool.remove
            assert bool(values[kept].min() > values[~kept].max())


def test_rescoring_of_a_tiny_model_gives_the_exact_selection(vit: nn.Module) -> None:
    kinds = {"ffn": "layer", "head": "layer", "residual": "layer"}
    groups, data = find_groups(vit, list(kinds)), batches(vit, 4, 4)
    setting = context(confidence=1 - 1e-9, fisher_directions=4)
    scores = fisher_kl(vit, groups, data, setting).scores
    pools = [
        c for k in kinds for c in candidate_pools({g.name: scores[g.name] for g in groups if g.kind == k}, 0.5, "layer")
    ]
    result = rescore(vit, groups, data, scores, pools, setting)
    again = rescore(vit, groups, data, scores, pools, setting)
    exact_scores = exact_kl(vit, groups, data, setting).scores
    for name, mask in select(result.scores, 0.5, "layer").items():
        assert torch.equal(mask, select(exact_scores, 0.5, "layer")[name])
        assert torch.equal(result.scores[name], again.scores[name])
    measured = torch.cat([s.flatten() for s in result.scores.values()])
    expected = torch.cat([s.flatten() for s in exact_scores.values()])
    close = (measured / expected - 1).abs() < 1e-9
    assert 0.1 < float(close.double().mean()) < 1  # those near the threshold, to the last image
    assert result.facts["units"] == len(measured)
    assert json.loads(json.dumps(result.facts)) == result.facts
    with pytest.raises(BadInput, match=r"^upvits: needs images; give calibration batches$"):
        rescore(vit, groups, [], scores, pools, setting)


def test_upvits_rescores_in_every_cycle(vit: nn.Module) -> None:
    plan = plan_for("upvits", {"ffn": 0.5, "attention": 0.25}, cycles=2)
    cycles = list(prune_cycles(vit, plan, batches(vit, 2, 4)))
    assert [cycle.facts["images"] for cycle in cycles] == [8, 8]
    assert all(cycle.facts["expected_overlap"] > 0.98 for cycle in cycles)
    assert int(cycles[1].masks["blocks.0.mlp"].sum()) == 96
    assert cycles[1].facts["units"] < cycles[0].facts["units"]
    dense = tiny("vit")
    inputs = batches(dense)[0][0]
    pruned = prune(dense, "upvits", sparsity=0.25, calibration=batches(dense), example_input=inputs).model
    assert pruned.blocks[0].mlp.fc1.out_features == 144


def test_the_mask_stage_rescores(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    project = project_in(tmp_path / "one", method="upvits", sparsity={"ffn": 0.5}, cycles=1)
    for stage in ORDER[:5]:
        monkeypatch.chdir(project)
        stages.run(stage, project)
    facts = json.loads((project / "metrics" / "mask.json").read_text())
    assert facts["rescoring"]["images"] == 100
    assert facts["rescoring"]["expected_overlap_ffn"] >= 0.99
    assert facts["sparsity"]["ffn"] == 0.5


@pytest.mark.parametrize(("sparsity", "cycles"), [(0.0, 1), ({"head": 0.34}, 3)])
def test_no_rescoring_at_zero_sparsity(vit: nn.Module, sparsity: object, cycles: int) -> None:
    done = list(prune_cycles(vit, plan_for("upvits", sparsity, cycles=cycles), batches(vit, 2, 4)))
    assert any(cycle.facts == {} for cycle in done)
