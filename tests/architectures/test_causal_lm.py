"""Pruning, scoring and training of a causal language model; logits and divergences per position."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.support.model_zoo import predict, random_masks, redrawn, state
from tests.support.plans import context, plan_for
from tests.support.pruned_models import rebuild
from tests.support.reference_kl import LiveNorm, kl
from vitprune import count, find_groups, prune, score, shrink, zero
from vitprune.architectures import merge_heads, structure
from vitprune.architectures.causal_lm import Decoder
from vitprune.architectures.chain_builders import build_chain
from vitprune.config.train_config import TrainConfig
from vitprune.criteria import DEFAULT_CONTEXT
from vitprune.criteria.kl.exact import exact_kl
from vitprune.criteria.kl.fisher import fisher_kl
from vitprune.criteria.obs.units import unit_obs
from vitprune.evaluation.losses import cross_entropy
from vitprune.pruning.prune_cycles import prune_cycles
from vitprune.pruning.select import select
from vitprune.training.distillation import classification, feature_distillation, logit_distillation
from vitprune.training.loop import train

CLOSE = {"rtol": 0, "atol": 1e-12}
WORDS, LENGTH = 11, 6


def decoder(seed: int = 0) -> Decoder:
    return redrawn(Decoder(WORDS, 8, width=12, depth=2, heads=3, mlp_ratio=2.0), seed).double()


def texts(number: int = 4, seed: int = 1) -> torch.Tensor:
    return torch.randint(WORDS, (number, LENGTH), generator=torch.Generator().manual_seed(seed))


def batches(number: int = 2) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(texts(seed=n), texts(seed=n + 100)) for n in range(number)]


def test_logits_depend_only_on_earlier_tokens() -> None:
    model, tokens = decoder(), texts()
    changed = tokens.clone()
    changed[:, 4] = (tokens[:, 4] + 1) % WORDS
    before, after = predict(model, tokens), predict(model, changed)
    assert before.shape == (4, LENGTH, WORDS)
    assert torch.equal(before[:, :4], after[:, :4])
    assert ((before - after)[:, 4:].abs().amax(-1) > 1e-6).all()
    torch.testing.assert_close(predict(model, tokens[:, :3]), before[:, :3], **CLOSE)


@pytest.mark.parametrize("kind", ["ffn", "head", "attention"])
def test_zero_and_shrink_give_the_same_logits(kind: str) -> None:
    zeroed, shrunk, tokens = decoder(), decoder(), texts()
    groups = find_groups(zeroed, [kind])
    masks = random_masks(groups, 1 if kind == "head" else 0.4)
    dense = predict(zeroed, tokens)
    zero(zeroed, groups, masks)
    shrink(shrunk, groups, masks)
    torch.testing.assert_close(predict(shrunk, tokens), predict(zeroed, tokens), **CLOSE)
    assert (predict(zeroed, tokens) - dense).abs().max() > 1e-3


def test_layer_norm_uses_only_the_kept_residual_channels() -> None:
    masked, shrunk, tokens = decoder(), decoder(), texts()
    groups = find_groups(shrunk, ["residual"])
    masks = random_masks(groups, 0.3)
    for path, module in list(masked.named_modules()):
        if isinstance(module, nn.LayerNorm):
            masked.set_submodule(path, LiveNorm(module, masks["residual"]))
    shrink(shrunk, groups, masks)
    torch.testing.assert_close(predict(shrunk, tokens), predict(masked, tokens), **CLOSE)
    assert shrunk.token_embed.embedding_dim == shrunk.embed_dim == 8


def test_groups_cover_every_parameter() -> None:
    model = decoder()
    reached = {
        part.param for kind in ("residual", "ffn", "head") for g in find_groups(model, [kind]) for part in g.slices
    }
    assert {name for name, _ in model.named_parameters()} - reached == {"head.bias"}


def test_a_cut_decoder_is_rebuilt_from_its_structure() -> None:
    model, tokens = decoder(), texts()
    groups = merge_heads(model, find_groups(model, ["residual", "attention", "ffn"]), 1)
    shrink(model, groups, random_masks(groups, 0.25))
    again = rebuild(decoder(1), structure(model))
    again.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(predict(again, tokens), predict(model, tokens))


@pytest.mark.parametrize("kind", ["ffn", "residual"])
def test_kl_is_summed_over_positions(kind: str) -> None:
    model, data = decoder(), batches()
    group = find_groups(model, [kind])[0]
    result = score(model, [group], "kl-literal", data)[group.name]
    tokens = torch.cat([inputs for inputs, _ in data])
    for unit in range(0, group.units, 5):
        cut = shrink(copy.deepcopy(model), [group], {group.name: torch.arange(group.units) != unit})
        each = [kl(predict(model, tokens)[:, index], predict(cut, tokens)[:, index]) for index in range(LENGTH)]
        assert float(result[unit]) == pytest.approx(sum(each), rel=1e-9)


@pytest.mark.parametrize("kind", ["ffn", "attention", "head", "residual"])
def test_exact_scores_equal_literal_removal(kind: str) -> None:
    model, data = decoder(), batches()
    groups = find_groups(model, [kind])
    expected = score(model, groups, "kl-literal", data)
    for name, result in score(model, groups, exact_kl, data).items():
        torch.testing.assert_close(result, expected[name], rtol=1e-6, atol=1e-15)


def test_chain_equals_the_model() -> None:
    model, tokens = decoder(), texts()
    with torch.no_grad():
        torch.testing.assert_close(build_chain(model)(tokens), predict(model, tokens), **CLOSE)


def test_taylor_uses_the_loss_of_all_positions() -> None:
    model, data = decoder(), batches(1)
    group = find_groups(model, ["ffn"])[0]
    result = score(model, [group], "taylor", data)[group.name]
    losses = []
    for by in (1e-5, -1e-5):
        other = decoder()
        mlp = other.blocks[0].mlp
        with torch.no_grad():
            for part in (mlp.fc1.weight[3], mlp.fc1.bias[3:4], mlp.fc2.weight[:, 3]):
                part *= 1 + by
        losses.append(float(F.cross_entropy(predict(other, data[0][0]).transpose(1, 2), data[0][1])))
    assert float(result[3]) == pytest.approx(((losses[0] - losses[1]) / 2e-5) ** 2, rel=1e-5)


def test_cross_entropy_equals_torch() -> None:
    logits, labels = predict(decoder(), texts()), texts(seed=2)
    for smoothing in (0.0, 0.1):
        expected = F.cross_entropy(logits.transpose(1, 2), labels, label_smoothing=smoothing)
        torch.testing.assert_close(cross_entropy(logits, labels, smoothing), expected)
        assert torch.equal(
            cross_entropy(logits[:, 0], labels[:, 0], smoothing),
            F.cross_entropy(logits[:, 0], labels[:, 0], label_smoothing=smoothing),
        )


def test_macs_of_a_decoder_by_hand() -> None:
    model = decoder()
    block = LENGTH * 12 * 36 + 2 * LENGTH**2 * 12 + LENGTH * 12 * 12 + 2 * LENGTH * 12 * 24
    assert count(model, texts(1)).macs == 2 * block + LENGTH * 12 * WORDS


@pytest.mark.parametrize("taught_by", ["logits", "features", None])
def test_a_pruned_decoder_recovers(taught_by: str | None) -> None:
    teacher = decoder()
    data = [(tokens, predict(teacher, tokens).argmax(-1)) for tokens in (texts(8, seed) for seed in range(4))]
    student = prune(teacher, "channel-magnitude", sparsity={"ffn": 0.5, "attention": 0.5}, calibration=data).model
    before, selected = state(teacher), loss(student, data)
    tasks = {
        "logits": lambda: logit_distillation(student, teacher, 1 / LENGTH, 1.0, 0.0),
        "features": lambda: feature_distillation(student, teacher, 1.0, 0.0, 0),
        None: lambda: classification(student),
    }
    train(tasks[taught_by](), lambda epoch: data, len(data), TrainConfig(epochs=10, lr=0.01), 0, lambda row: None)
    assert loss(student, data) < 0.7 * selected
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def loss(model: nn.Module, data: list) -> float:
    return sum(float(cross_entropy(predict(model, tokens), labels)) for tokens, labels in data) / len(data)


@pytest.mark.parametrize("method", ["channel-taylor", "upvits-literal", "dimap"])
def test_methods_prune_a_decoder_in_cycles(method: str) -> None:
    model, data = decoder(), batches(1)
    share = 0.5 if method == "dimap" else {"ffn": 0.5, "attention": 0.5}
    for cycle in prune_cycles(model, plan_for(method, share, cycles=2), data):
        kept = [float(mask.double().mean()) for mask in cycle.masks.values()]
    assert sum(kept) / len(kept) == pytest.approx(0.5, abs=0.02)
    assert predict(model, texts()).isfinite().all()


def test_fisher_ranks_units_as_exact_scores_do() -> None:
    model, data = decoder(), batches(4)
    groups = find_groups(model, ["ffn"])
    true = score(model, groups, "kl-exact", data)
    near = fisher_kl(model, groups, data, context(fisher_directions=64)).scores
    for group in groups:
        ranks = torch.stack([result[group.name].argsort().argsort().double() for result in (true, near)])
        assert float(torch.corrcoef(ranks)[0, 1]) > 0.8
        assert 0.5 < float(near[group.name].sum() / true[group.name].sum()) < 2


@pytest.mark.parametrize("kind", ["ffn", "head", "attention"])
def test_unit_obs_refits_the_remaining_weights_of_a_decoder(kind: str) -> None:
    model, data = decoder(), batches(8)
    groups = find_groups(model, [kind])
    importance = unit_obs(model, groups, data, DEFAULT_CONTEXT)
    assert importance.update is not None
    scope = "head" if kind == "attention" else "layer"
    masks = select(importance.scores, 0.34, scope, groups)
    tokens = torch.cat([inputs for inputs, _ in data])
    plain, refitted = decoder(), decoder()
    near = select(
        fisher_kl(model, groups, data, DEFAULT_CONTEXT).scores, 0.34, "head" if kind == "attention" else "layer", groups
    )
    with torch.no_grad():
        for name, value in importance.update(masks).items():
            refitted.get_parameter(name).copy_(value)
    dense = predict(model, tokens)
    lost = [kl(dense, predict(m, tokens)) for m in (shrink(refitted, groups, masks), shrink(plain, groups, near))]
    assert lost[0] < 0.7 * lost[1]
