"""Fine-tune a pruned model on a data loader, with or without a teacher; removed weights remain zero."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from vitprune.architectures import find_groups
from vitprune.architectures.classifier import of_same_classes
from vitprune.config.section import check_seed
from vitprune.config.train_config import DistillConfig, TrainConfig
from vitprune.data.batch_checks import checked_input, checked_stream, first_image, no_images
from vitprune.errors import BadInput
from vitprune.evaluation.logits import logits_of
from vitprune.runtime.arguments import check_arguments
from vitprune.runtime.eval_mode import eval_mode, frozen, kept_mode
from vitprune.runtime.input_size import input_size
from vitprune.runtime.outputs import require_classifier, returning_logits
from vitprune.runtime.wrappers import is_timm_model, plain_model
from vitprune.training.distillation import classification, distillation_task
from vitprune.training.loop import FrozenZeros, train
from vitprune.training.optimizers import OptimizerState, ScheduleSpan

DEFAULT_DISTILLATION = DistillConfig()
SEED_STEP = 1000  # between the seeds of the fine-tunings of two cycles


@dataclass(frozen=True)
class RecoverySegment:
    """Fine-tuning after one pruning cycle, as part of the learning-rate schedule over all cycles.

    Attributes:
        cycle: Number of the cycle, from 1.
        epochs: Epochs of the fine-tuning after each cycle.
        memory: Optimizer state to continue from and to update; None starts with a new optimizer.
        paths: Paths in the dense model by path, of modules that a removal of blocks has renamed.
    """

    cycle: int
    epochs: list[int]
    memory: OptimizerState | None
    paths: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the training in messages."""
        return f"recovery after cycle {self.cycle}"

    def span(self, recipe: TrainConfig, steps: int) -> ScheduleSpan:
        """Return the position of this segment in the schedule, given the number of steps of an epoch."""
        if recipe.decay_over == "cycle":
            return ScheduleSpan(0, recipe.epochs * steps, self.memory, self.paths)
        before = sum(self.epochs[: self.cycle - 1])
        return ScheduleSpan(before * steps, sum(self.epochs) * steps, self.memory, self.paths)


@check_arguments()
def finetune(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    config: TrainConfig,
    teacher: nn.Module | None = None,
    keep_zeros: bool | FrozenZeros = True,
    distillation: DistillConfig = DEFAULT_DISTILLATION,
    seed: int = 0,
    segment: RecoverySegment | None = None,
) -> list[dict[str, float]]:
    """Train a pruned model in place, on labels or by distillation from the dense model; it keeps its mode.

    Args:
        model: The model.
        loader: Batches (images, labels) that can be iterated once per epoch, with a length, such as a DataLoader. It
            decides augmentation and batch size: `augment`, `repeats` and `batch_size` of the config are not used.
        config: Epochs, optimizer and schedule.
        teacher: The dense model, for distillation; None for training on labels alone. It is not changed. If the model
            was pruned to some classes, only the teacher's outputs of these classes are used.
        keep_zeros: True: keep all single weights at zero that are zero; or keep those of given masks at zero.
        distillation: Distance to the teacher and its weight.
        seed: Seed of random numbers.
        segment: Position in a gradual run, for the learning rate and the state of the optimizer; set by
            `gradual_prune`.

    Returns:
        One record per epoch: epoch, step, mean loss and learning rate.

    Raises:
        BadInput: the model has no classifier or is frozen, the teacher does not fit the model, the loader is an
            iterator, has no length or is empty, a batch cannot be used, or the optimizer is unknown.
        NotFinite: a loss or gradient is not finite.

    Example:
        vitprune.finetune(result.model, loader, TrainConfig(epochs=3, lr=1e-4), teacher=model)
    """
    if not isinstance(loader, Sized):
        raise BadInput("loader: has no length; give a list or a DataLoader over a sized dataset")
    if not len(loader):
        raise no_images("loader")
    check_seed(seed)
    require_classifier(model, "give it one, as by reset_classifier")
    model, history = plain_model(model), list[dict[str, float]]()
    teacher = None if teacher is None else _checked_teacher(teacher, model, distillation)
    zeros = keep_zeros if isinstance(keep_zeros, FrozenZeros) else zero_weights(model) if keep_zeros else None
    name, steps = "fine-tuning" if segment is None else segment.name, len(loader)
    span = segment.span(config, steps) if segment is not None else None
    networks = [model] if teacher is None else [model, teacher]
    others = [network for network in networks if not is_timm_model(plain_model(network))]
    with kept_mode(model), returning_logits(*others), _with_timm_attributes(others, loader), _unchanged(teacher):
        classes = vars(model).get("num_classes")
        task: Any = classification(model, config.smoothing)
        if teacher is not None:
            task = distillation_task(model, teacher, distillation, config.smoothing, seed)
        train(
            task,
            lambda epoch: _batches(loader, model, teacher, classes),
            steps,
            config,
            seed,
            history.append,
            zeros,
            name=name,
            span=span,
        )
    return history


def _checked_teacher(teacher: nn.Module, model: nn.Module, distillation: DistillConfig) -> nn.Module:
    """Return the teacher without its wrappers, with the classes and the type of the model."""
    plain = plain_model(teacher)
    if plain is model:
        raise BadInput("teacher: is the model that is trained; give the dense model, or a copy (copy.deepcopy)")
    for network in (model, plain) if distillation.kind == "features" else ():
        if not is_timm_model(network):
            raise BadInput(f"distill.kind features: {type(network).__name__} is not a model of timm; use logits")
    result, dtype = of_same_classes(plain, model), next(model.parameters()).dtype
    return result if next(plain.parameters()).dtype == dtype else copy.deepcopy(result).to(dtype)


def _batches(
    loader: Iterable[tuple[Tensor, Tensor]], model: nn.Module, teacher: nn.Module | None, classes: int | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield checked batches of one epoch; the teacher runs on the first image of each shape."""
    shapes: set[tuple[int, ...]] = set()
    for images, labels in checked_stream(loader, model, "loader", classes):
        if teacher is not None:
            checked_input("teacher", images[:1], teacher, shapes)
        yield images, labels


@contextmanager
def _unchanged(teacher: nn.Module | None) -> Iterator[None]:
    """Restore the mode of a teacher and the gradients of its parameters, which distillation disables, at the end."""
    if teacher is None:
        yield
    else:
        with eval_mode(teacher), frozen(teacher):
            yield


@contextmanager
def _with_timm_attributes(models: Sequence[Any], loader: Iterable[Any]) -> Iterator[None]:
    """Give models of other libraries the attributes that timm's tasks read, while the context is open."""
    added: list[tuple[Any, str]] = []
    for model in models:
        size = input_size(model)
        same = {"input_size": size, "mean": (0.0,) * size[0], "std": (1.0,) * size[0]}  # teacher and student alike
        classes = getattr(model, "num_classes", None) or getattr(model, "num_labels", None)
        classes = classes or logits_of(model, [first_image(loader, model, "loader")])[0].shape[-1]
        for name, value in {"num_classes": classes, "in_chans": size[0], "pretrained_cfg": same}.items():
            if not hasattr(model, name):
                setattr(model, name, value)
                added.append((model, name))
    try:
        yield
    finally:
        for model, name in added:
            delattr(model, name)


def zero_weights(model: nn.Module) -> FrozenZeros | None:
    """Return the single weights that are zero, layer by layer; None if there are none."""
    try:
        groups = find_groups(model, ["weight"])
    except BadInput:  # single weights of this model cannot be pruned
        return None
    masks = {group.name: model.get_parameter(group.name).detach() != 0 for group in groups}
    with_zeros = [group for group in groups if not bool(masks[group.name].all())]
    return FrozenZeros(with_zeros, {group.name: masks[group.name] for group in with_zeros}) if with_zeros else None
