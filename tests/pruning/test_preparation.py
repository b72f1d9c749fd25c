"""Token merging as a setting of pruning: targets, updates towards the dense model with all tokens, refusals."""

import pytest
import torch
from torch import nn

from tests.support.model_zoo import batches, images, tiny
from vitprune import (
    AllocationConfig,
    BadInput,
    PruneConfig,
    ReconstructConfig,
    TrainConfig,
    count,
    gradual_prune,
    merge_tokens,
    prune,
)
from vitprune.config.targets import Target
from vitprune.pipeline.check_settings import check_plan
from vitprune.pruning.cycle_masks import cycle_state
from vitprune.pruning.plan import plan_for


def test_a_target_refers_to_the_dense_model_with_all_tokens() -> None:
    model = tiny("vit")
    settings = {"calibration": batches(model), "target": {"macs": 0.6}}
    result = prune(model, "unit-obs", merge_tokens=4, **settings)
    dense, pruned = (count(one, images(model)).macs for one in (model, result.model))
    assert pruned / dense == pytest.approx(0.6, rel=0.02)
    assert result.model.blocks.merged == (0, 4)
    without = prune(model, "unit-obs", **settings)
    assert sum(mask.sum() for mask in result.masks.values()) > sum(mask.sum() for mask in without.masks.values())


def test_a_target_that_merging_alone_reaches_is_refused() -> None:
    model = tiny("vit")
    message = r"^prune.merge_tokens: merged tokens reduce macs to 0.9\d+ of the dense model without .* is 0.9500"
    with pytest.raises(BadInput, match=message):
        prune(model, "unit-obs", calibration=batches(model), target={"macs": 0.95}, merge_tokens=4)
    with pytest.raises(BadInput, match=message):
        prune(merge_tokens(tiny("vit"), 4), "unit-obs", calibration=batches(model), target={"macs": 0.95})
    plan = plan_for(PruneConfig(method="unit-obs", target={"macs": 0.95}, merge_tokens=4))
    with pytest.raises(BadInput, match=message):
        check_plan(model, plan)
    assert type(model.blocks) is nn.Sequential


def test_the_limits_of_the_cycles_start_at_the_cost_of_the_merging_model() -> None:
    model = tiny("vit")
    config = PruneConfig(method="unit-obs", target={"macs": 0.5}, cycles=4, schedule="linear", merge_tokens=6)
    plan = plan_for(config)
    merging = merge_tokens(tiny("vit"), 6)
    state = cycle_state(merging, plan)
    start = count(merging, images(model)).macs / count(model, images(model)).macs
    assert state.costs.model.start == pytest.approx(start)
    limits = plan.cost_limits(state.costs.final, state.costs.model.start)
    assert limits == pytest.approx([start - (start - 0.5) * part for part in (0.25, 0.5, 0.75, 1)])


def test_widths_are_searched_for_a_merging_model() -> None:
    model = tiny("vit")
    settings = {"calibration": batches(model, 4, 6), "target": {"macs": 0.6}, "merge_tokens": 6}
    result = prune(model, "unit-obs", allocation=AllocationConfig(evaluations=10), **settings)
    dense, pruned = (count(one, images(model)).macs for one in (model, result.model))
    assert pruned / dense == pytest.approx(0.6, rel=0.03)


def test_the_result_is_reconstructed_and_corrected_towards_all_tokens() -> None:
    model = tiny("vit")
    settings = {"calibration": batches(model, 4, 6), "merge_tokens": 6, "sparsity": {"residual": 0.25}}
    config = ReconstructConfig(passes=3, lr=1e-3, mirror=False)
    result = prune(model, "unit-obs", rotate_residual=True, correct_norms=True, reconstruct=config, **settings)
    facts = result.reconstruction
    assert facts["nats_after"] < facts["nats_before"]
    assert result.model.embed_dim == 36


def test_cycles_with_training_keep_the_merging() -> None:
    model = tiny("vit", dtype=torch.float32)
    recipe = TrainConfig(epochs=1, lr=1e-3)
    config = PruneConfig(method="channel-taylor", sparsity=0.5, cycles=2, merge_tokens=3, finetune=recipe)
    result = gradual_prune(model, config, batches(model), calibration=batches(model))
    assert result.model.blocks.merged == (0, 3)
    checkpointed = config.model_copy(update={"finetune": TrainConfig(epochs=1, lr=1e-3, checkpointing=True)})
    with pytest.raises(BadInput, match=r"^train.checkpointing: not supported with merged tokens; set it to false"):
        gradual_prune(model, checkpointed, batches(model), calibration=batches(model))


def test_other_models_and_tables_are_refused() -> None:
    model = tiny("swin")
    with pytest.raises(BadInput, match=r"^SwinTransformer: only VisionTransformer"):
        prune(model, "channel-magnitude", sparsity=0.5, merge_tokens=2)
    target = Target(latency_ms=5, table="times.parquet")
    with pytest.raises(BadInput, match=r"^prune.merge_tokens: the times of prune.target.table are those of all tokens"):
        plan_for(PruneConfig(method="unit-obs", target=target, merge_tokens=2))
    with pytest.raises(BadInput, match=r"merge_tokens"):
        prune(tiny("vit"), "channel-magnitude", sparsity=0.5, merge_tokens=0)
    merging = merge_tokens(tiny("vit"), 2)
    again = prune(merging, "channel-magnitude", sparsity=0.5, merge_tokens=3).model
    assert again.blocks.merged == (0, 3)
