"""Gradual pruning in Python: prune and fine-tune in turns."""

import time
from collections.abc import Iterable, Sized

from torch import Tensor, nn

from vitprune.architectures.narrow_attention import call_output_projections
from vitprune.config.prune_config import PruneConfig
from vitprune.config.score_config import ScoreConfig
from vitprune.config.section import SEEDS
from vitprune.criteria import DEFAULT_SCORE_CONFIG, Batches
from vitprune.data.batch_checks import checked_batches, first_image
from vitprune.data.class_subset import images_of_classes
from vitprune.errors import BadInput
from vitprune.pruning.block_steps import dense_paths
from vitprune.pruning.methods import method_named
from vitprune.pruning.preparation import prepared
from vitprune.pruning.prune import PruneResult, fitting_plan, result_of, usable_plan, working_copy
from vitprune.pruning.prune_cycles import prune_cycles
from vitprune.runtime.arguments import check_arguments
from vitprune.runtime.eval_mode import scoring_mode
from vitprune.runtime.input_size import set_input_size
from vitprune.runtime.model_checks import float_type
from vitprune.runtime.wrappers import is_timm_model, plain_model
from vitprune.training.finetune import SEED_STEP, RecoverySegment, finetune
from vitprune.training.loop import FrozenZeros
from vitprune.training.optimizers import OptimizerState


@check_arguments()
def gradual_prune(
    model: nn.Module,
    config: PruneConfig,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    calibration: Batches = (),
    score: ScoreConfig = DEFAULT_SCORE_CONFIG,
    teacher: nn.Module | None = None,
    seed: int = 0,
) -> PruneResult:
    """Prune a copy of a model over `config.cycles` cycles, and fine-tune it after each.

    Args:
        model: A model, as in `prune`; it is not changed.
        config: Method, sparsity or target, cycles, schedule, and the fine-tuning after every cycle.
        loader: Training batches, see `finetune`.
        calibration: Batches for methods that need data.
        score: Options of the criteria.
        teacher: Teacher of the fine-tuning, which is not changed; None for labels alone.
        seed: Seed of random numbers.

    Returns:
        The result after the last cycle and its fine-tuning.

    Raises:
        BadInput: `config.finetune` is missing, or as `prune` and `finetune`.

    Example:
        config = PruneConfig(method="lamp", sparsity=0.9, cycles=5, finetune=TrainConfig(epochs=2, lr=1e-4))
        result = vitprune.gradual_prune(model, config, loader)
    """
    recipe = config.finetune
    if recipe is None:
        raise BadInput(
            "prune.finetune: gradual_prune trains after every cycle; give a TrainConfig, or use prune with cycles"
        )
    start, memory, pruned = time.perf_counter(), OptimizerState(), working_copy(model)
    if method_named(config.method, "prune.method").records_layers:
        call_output_projections(pruned)
    given = checked_batches(calibration, pruned)
    set_input_size(pruned, given[0][0] if given else _first_image(loader, pruned))
    plan, skipped = fitting_plan(pruned, config, score, seed)
    epochs = plan.epochs(recipe.epochs)
    if given:
        plan, unusable = usable_plan(pruned, plan, given[0][0])
        skipped |= unusable
    batches = images_of_classes(given, config.classes)
    pruned = prepared(pruned, plan, batches)
    with scoring_mode(pruned):
        for cycle in prune_cycles(pruned, plan, batches):
            keep_zeros = config.keep_zeros or FrozenZeros(cycle.zeroed, cycle.masks)
            kept, paths = memory if recipe.optimizer_state == "keep" else None, dense_paths(cycle.groups, cycle.masks)
            segment = RecoverySegment(cycle.number, epochs, kept, paths)
            settings = recipe.model_copy(update={"epochs": epochs[cycle.number - 1]})
            seed_of_cycle = (seed + SEED_STEP * cycle.number) % SEEDS
            finetune(pruned, loader, settings, teacher, keep_zeros, seed=seed_of_cycle, segment=segment)
    return result_of(model, pruned.to(float_type(plain_model(model))), cycle, start, skipped)


def _first_image(loader: Iterable[tuple[Tensor, Tensor]], model: nn.Module) -> Tensor | None:
    """Return a training image whose size a model that is not timm's takes; None if it is timm's, or there is none."""
    if is_timm_model(model) or not isinstance(loader, Sized) or not len(loader):  # `finetune` refuses such a loader
        return None
    return first_image(loader, model, "loader")
