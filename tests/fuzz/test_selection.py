"""Masks: exact counts, nested in the sparsity and over cycles; targets are met within 2 % or explained."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.model_zoo import tiny
from vitprune import BadInput, prune
from vitprune.pruning.constraints import rounded
from vitprune.pruning.select import select

SHAPES = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 9)), min_size=1, max_size=4)
SHARES = st.floats(0, 0.999)


def scores_of(shapes: list[tuple[int, int]], seed: int, levels: int) -> dict[str, torch.Tensor]:
    """Draw scores, with so few distinct values that many are ties."""
    generator = torch.Generator().manual_seed(seed)
    return {
        str(number): torch.randint(-levels, levels + 1, shape, generator=generator).double()
        for number, shape in enumerate(shapes)
    }


@given(shapes=SHAPES, seed=st.integers(0, 999), levels=st.sampled_from([0, 1, 1000]), shares=st.tuples(SHARES, SHARES))
def test_counts_are_exact_and_masks_are_nested(
    shapes: list[tuple[int, int]], seed: int, levels: int, shares: tuple[float, float]
) -> None:
    scores, (less, more) = scores_of(shapes, seed, levels), sorted(shares)
    units = sum(score.numel() for score in scores.values())
    for scope in ("global", "layer", "head"):
        few, many = select(scores, less, scope), select(scores, more, scope)
        later = select(scores_of(shapes, seed + 1, levels), more, scope, previous=few)
        for masks, share in ((few, less), (many, more), (later, more)):
            removed = {name: int((~mask).sum()) for name, mask in masks.items()}
            if scope == "global":
                assert sum(removed.values()) == rounded(share * units)
            if scope == "layer":
                assert all(removed[name] == rounded(share * mask.numel()) for name, mask in masks.items())
            if scope == "head":
                assert all(int((~row).sum()) == rounded(share * len(row)) for mask in masks.values() for row in mask)
        for name, mask in few.items():
            assert not bool((many[name] & ~mask).any())
            assert not bool((later[name] & ~mask).any())
            best = scores[name][mask].min() if bool(mask.any()) and scope == "layer" else None
            assert best is None or bool((scores[name][~mask] <= best).all())


@given(shapes=SHAPES, share=st.one_of(SHARES, st.floats()), place=st.integers(0, 3))
def test_nan_and_fractions_out_of_range_are_refused(shapes: list[tuple[int, int]], share: float, place: int) -> None:
    scores = scores_of(shapes, 0, 5)
    if place < len(shapes):
        scores[str(place)][0, 0] = torch.nan
    try:
        select(scores, share)
    except BadInput:
        assert place < len(shapes) or not 0 <= share < 1
    else:
        assert place >= len(shapes)
        assert 0 <= share < 1


@settings(max_examples=max(4, settings().max_examples // 5))
@given(
    cost=st.sampled_from(["macs", "params"]),
    share=st.floats(0.05, 0.98),
    name=st.sampled_from(["vit", "odd", "swin"]),
    method=st.sampled_from(["channel-magnitude", "magnitude", "uniform"]),
    round_to=st.sampled_from([None, 4, 8]),
)
def test_a_target_is_met_within_2_percent_or_explained(
    cost: str, share: float, name: str, method: str, round_to: int | None
) -> None:
    single = method != "channel-magnitude"
    try:
        result = prune(
            tiny(name), method, target={cost: share}, **({} if single or round_to is None else {"round_to": round_to})
        )
    except BadInput as error:
        if "the smallest is" not in str(error):
            raise
        return
    key = f"nonzero_{cost}" if single else cost
    reached = getattr(result.after, key) / getattr(result.before, key)
    assert reached <= share * (1 + 1e-9)
    assert reached >= 0.98 * share or result.target_miss
