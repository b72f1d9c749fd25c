"""Properties of every criterion: it does not change the model, ignores dropout and refuses bad input."""

from collections.abc import Callable
from functools import partial

import pytest
import torch

from tests.support.model_zoo import batches, same_state, state, tiny
from vitprune import CRITERIA, METHODS, BadInput, find_groups, prune, score
from vitprune.criteria import Importance
from vitprune.criteria.magnitude import magnitude

SECOND_ORDER = ("corp", "fastcap", "magnitude-obs", "obc", "ovit", "unit-obs", "upvits-refit", "woodfisher-joint")
KINDS = {"random": "ffn", "magnitude": "ffn", "energy": "weight", "taylor": "ffn", "kl-literal": "head"}


@pytest.mark.parametrize("criterion", ["taylor", "kl-literal"])
def test_dropout_is_disabled_during_scoring(criterion: str) -> None:
    vit = tiny("thin")
    groups, data = find_groups(vit, ["head"]), batches(vit)
    for block in vit.blocks:
        block.mlp.drop1.p = 0.5
    expected = score(vit.eval(), groups, criterion, data)
    result = score(vit.train(), groups, criterion, data)
    assert all(torch.equal(result[name], expected[name]) for name in expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_criterion_does_not_change_the_model(vit: torch.nn.Module, criterion: str, training: bool) -> None:
    vit.train(training)
    before = state(vit)
    kinds = {name: row.kinds[0] for name, row in METHODS.items()} | KINDS
    groups = find_groups(vit, [kinds.get(criterion, "ffn")])
    data = batches(vit)
    result = score(vit, groups, criterion, data)
    assert not any(images.requires_grad for images, _ in data)
    assert same_state(vit, before)
    assert all(p.grad is None and p.requires_grad for p in vit.parameters())
    assert all(module.training is training for module in vit.modules())
    assert [(n, tuple(s.shape), s.dtype) for n, s in result.items()] == [
        (g.name, g.shape, torch.float64) for g in groups
    ]
    assert not any(s.requires_grad for s in result.values())


@pytest.mark.parametrize("method", SECOND_ORDER)
def test_only_single_matrices_are_factorized_by_lu(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("inv", "inv_ex", "solve", "solve_ex", "lu", "lu_factor", "det", "slogdet"):
        monkeypatch.setattr(torch.linalg, name, partial(_single, getattr(torch.linalg, name)))
    model = tiny("thin")
    prune(model, method, sparsity=0.5, calibration=batches(model), cycles=2, correct_norms=True)


def _single(function: Callable[..., object], matrix: torch.Tensor, *arguments: object) -> object:
    assert matrix.ndim == 2, "batches have wrong results on a CPU with several threads"
    return function(matrix, *arguments)


def test_data_dependent_criteria_refuse_missing_batches(vit: torch.nn.Module) -> None:
    for criterion in ("taylor", "kl-literal"):
        with pytest.raises(BadInput, match=r"give calibration batches$"):
            score(vit, find_groups(vit, ["ffn"]), criterion)


def test_an_unknown_criterion_name_is_refused_and_a_function_is_accepted(vit: torch.nn.Module) -> None:
    groups = find_groups(vit, ["ffn"])
    with pytest.raises(BadInput, match=r"^criterion 'best': unknown; use one of random, magnitude, energy"):
        score(vit, groups, "best")
    selected, named = score(vit, groups, magnitude), score(vit, groups, "magnitude")
    assert all(torch.equal(selected[name], named[name]) for name in named)


@pytest.mark.parametrize(("scores", "found"), [(None, "no scores"), (torch.ones(191), r"scores \[191\]")])
def test_a_criterion_that_does_not_score_every_unit_is_refused(vit: torch.nn.Module, scores, found: str) -> None:
    groups = find_groups(vit, ["ffn"])
    given = {groups[0].name: torch.arange(192.0)} | ({} if scores is None else {groups[1].name: scores})
    with pytest.raises(BadInput, match=rf"^criterion: returned {found} for blocks.1.mlp; it must return \[192\]$"):
        score(vit, groups, lambda *_: Importance(given), batches(vit))
    with pytest.raises(BadInput, match=rf"^criterion: returned {found} for blocks.1.mlp"):
        score(vit, groups[1:], lambda *_: Importance(given), batches(vit))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_no_groups_are_refused(vit: torch.nn.Module, criterion: str) -> None:
    with pytest.raises(BadInput, match=r"^groups: is empty; give groups of find_groups$"):
        score(vit, [], criterion, batches(vit))


def test_a_one_pass_iterator_of_batches_is_refused(vit):
    groups = find_groups(vit, ["ffn"])
    with pytest.raises(BadInput, match="used up after one pass"):
        score(vit, groups, "taylor", iter([(torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.int64))]))
