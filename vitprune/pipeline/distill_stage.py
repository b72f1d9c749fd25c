"""The distill stage: fine-tune the pruned model with the dense model as teacher."""

from torch import nn

from vitprune import models
from vitprune.architectures import find_groups
from vitprune.architectures.classifier import of_same_classes
from vitprune.config.params import Params
from vitprune.pipeline.artifacts import MASKS, History, model_facts
from vitprune.pipeline.dense_stage import zeros_to_keep
from vitprune.pipeline.project_data import MANIFEST, METRICS, OUT, PLOTS, device
from vitprune.pipeline.stage_training import evaluate_model, stage_checkpoint, train_model
from vitprune.runtime import tables
from vitprune.runtime.distributed import process_group
from vitprune.runtime.files import write_json
from vitprune.training.distillation import distillation_task
from vitprune.training.loop import FrozenZeros


def run(params: Params) -> None:
    """Write the fine-tuned model, its training curve and metrics/distill.json; pruned weights remain zero."""
    settings, inputs = params.distill, [MANIFEST, OUT / "dense", OUT / "prune", OUT / "cycles"]
    with process_group(device()) as dist, stage_checkpoint("distill", params, inputs, dist) as checkpoint:
        model = models.load(OUT / "prune").to(device())
        teacher = of_same_classes(models.load(OUT / "dense").to(device()), model)
        evaluate = evaluate_model(model, params)
        history = History(OUT / "distill", "distill", dist.rank == 0)
        if settings.train is not None:
            task = distillation_task(model, teacher, settings, settings.train.smoothing, params.seed)
            frozen = zeros_to_keep(model, params, _pruned_weights(teacher), settings.keep_zeros)
            store = checkpoint.store("training")
            train_model(
                task, settings.train, params, history, store, frozen, evaluate, dist=dist, cache_outputs=settings.cache
            )
        if dist.rank:
            return
        history.close(PLOTS / "distill.csv")
        models.save(model, OUT / "distill")
        facts = model_facts(model, OUT / "distill") | evaluate() | {"epochs": history.epochs}
        write_json(METRICS / "distill.json", facts)


def _pruned_weights(dense: nn.Module) -> FrozenZeros | None:
    """Return the masks of single weights of the last cycle; None for structured pruning."""
    folder = max(OUT.glob("cycles/[0-9]*"))
    kinds = {row["kind"] for row in tables.read_table(folder / "sparsity.parquet", tables.SPARSITY).to_pylist()}
    if "weight" not in kinds:
        return None
    return FrozenZeros(find_groups(dense, ["weight"]), models.read_weights(folder / MASKS))
