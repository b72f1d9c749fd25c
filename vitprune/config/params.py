"""params.yaml as types: an unknown key, a wrong type or a value out of range is an error that names the key."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import Field, ValidationError, model_validator

from vitprune.config.targets import Count, Fraction, Rule, Section, Target
from vitprune.config.train_config import Train
from vitprune.errors import BadInput

SectionType = TypeVar("SectionType", bound=Section)
Epoch = Annotated[int, Field(ge=0)]
Kind = Literal["weight", "ffn", "attention", "head", "residual", "block"]
RENAMED = {  # keys of earlier versions -> their present names
    "score.classes": "score.fisher_directions",
    "score.block": "score.fisher_block_size",
    "score.damp": "score.damping",
    "score.gradients": "score.num_gradients",
    "prune.heads": "prune.merge_heads_to",
    "prune.recover": "prune.finetune",
    "prune.correct": "prune.correct_norms",
    "prune.hold_zeros": "prune.keep_zeros",
    "distill.hold_zeros": "distill.keep_zeros",
}


class Dataset(Section):
    """Where images come from: digits, folder:PATH, parquet:PATH or a timm dataset name; `classes` by label."""

    source: str
    classes: list[str] | None = None
    eval_source: str | None = None
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    skip_limit: Annotated[float, Field(ge=0, le=1)] = 0.01


class Model(Section):
    """A timm model by name, and the arguments of timm.create_model."""

    name: str
    args: dict[str, Any] = Field(default_factory=dict)


class Dense(Section):
    """The model to prune: where its weights start, and how it is trained here (needed if it starts from nothing).

    The checkpoint is a safetensors file with the weights of `model`, or the directory of a saved model, pruned or not,
    which may get another number of classes.
    """

    start: Literal["train", "pretrained", "checkpoint"]
    checkpoint: Path | None = None
    train: Train | None = None


class Calibrate(Section):
    """The calibration set: how many images of the train split, drawn evenly over classes or uniformly."""

    size: Count | None = None
    balance: Literal["class", "uniform"] = "class"


class Score(Section):
    """How scoring runs: images per batch, memory of the candidates in flight (MiB), gradients per image.

    `autocast` runs Fisher's passes in bfloat16; `confidence` is that of the kept set where scores are estimated first.
    Fisher blocks of single weights: `fisher_block_size`, `damping`, `num_gradients` (null: every image once), and
    whether a gradient is of one image (`per_sample`) or of the mean loss of `gradient_batch` images; `memory_mb` bounds
    the matrices held.
    """

    batch_size: Count = 64
    memory_mb: Count = 1024
    fisher_directions: Count = 8
    autocast: bool = False
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.99
    fisher_block_size: Count = 192
    damping: Annotated[float, Field(gt=0)] = 1e-8
    num_gradients: Count | None = None
    gradient_batch: Count = 128
    per_sample: bool = True


class Schedule(Section):
    """Sparsity over the cycles: a shape that starts at the sparsity `initial`, or all `steps` themselves.

    Steps are a list, one sparsity per cycle, or epoch: sparsity, the epochs being those of the whole run at which the
    cycles prune; `prune.finetune.epochs` are those of the last cycle then. Both end at `prune.sparsity`.
    """

    shape: Literal["linear", "cubic"] | None = None
    initial: Fraction | None = None
    steps: Annotated[list[Fraction], Field(min_length=1)] | dict[Epoch, Fraction] | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.shape is None) == (self.steps is None) or (self.steps is not None and self.initial is not None):
            raise ValueError("give a shape, with or without an initial sparsity, or steps")
        return self


class Prune(Section):
    """Method, the kinds that it scores, sparsity (one for all, or per kind), the gradual schedule and its recovery.

    `kinds` null means the method's usual ones; a kind that is not scored cannot be pruned. A `target` takes the place
    of the sparsity; sparsities per kind are relative to each other then. What stays of every group is a multiple of
    `round_to`, one for all kinds that are widths or one per kind; `rules` hold for single groups.
    `correct_norms` moves norms and biases once towards the dense answers, after each cycle and before its recovery.
    `keep_zeros` holds the zeros of a checkpoint in the recovery; those of the plan's own weights are always held.
    """

    method: str
    kinds: list[Kind] | None = None
    sparsity: Fraction | dict[Kind, Fraction] | None
    target: Target | None = None
    scope: str | None = None
    round_to: Count | dict[Kind, Count] | None = None
    rules: tuple[Rule, ...] = ()
    merge_heads_to: Count | None = None
    cycles: Count = 1
    schedule: Literal["linear", "cubic"] | Schedule = "cubic"
    correct_norms: bool = False
    finetune: Train | None = None
    keep_zeros: bool = True

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if self.target is not None and isinstance(self.sparsity, float):
            raise ValueError("give a target or one sparsity, not both; beside a target, sparsity is null or per kind")
        return self


class Distill(Section):
    """Fine-tuning by the dense model: cross-entropy + alpha * distance from it; none where train is null.

    The distance is the KL divergence of logits at a temperature, or the mean squared error of the features before the
    head, which has no temperature. `cache` asks the dense model once for every image and keeps the answers in memory;
    images that are augmented or mixed differ from epoch to epoch, and it is refused. `keep_zeros` is as in `prune`.
    """

    kind: Literal["logits", "features"] = "logits"
    alpha: Annotated[float, Field(ge=0)] = 1.0
    temperature: Annotated[float, Field(gt=0)] = 1.0
    cache: bool = False
    train: Train | None = None
    keep_zeros: bool = True

    @model_validator(mode="after")
    def _always_alike(self) -> Self:
        t = self.train
        if self.cache and t is not None and (t.augment != "none" or t.mixes):
            key = "augment" if t.augment != "none" else "mixup" if t.mixup else "cutmix"
            raise ValueError(f"no cache: train.{key} shows an image differently in every epoch; give up one of the two")
        return self


class Evaluate(Section):
    """How the two models are measured."""

    batch_size: Count = 64
    latency_batch: Count = 1
    latency_runs: Count = 50


class Export(Section):
    """What else is written beside the timm directory: an ONNX file, and one in INT8 made of it."""

    onnx: bool = False
    int8: bool = False

    @model_validator(mode="after")
    def _of_onnx(self) -> Self:
        if self.int8 and not self.onnx:
            raise ValueError("INT8 is made of the ONNX file; set export.onnx to true")
        return self


class Params(Section):
    """The whole of params.yaml."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    threads: Count | None = None
    dataset: Dataset
    model: Model
    dense: Dense
    calibrate: Calibrate = Calibrate()
    score: Score = Score()
    prune: Prune
    distill: Distill = Distill()
    evaluate: Evaluate = Evaluate()
    export: Export = Export()


def load(path: Path) -> Params:
    """Read and check a params.yaml.

    Raises:
        BadInput: the file is missing, is not YAML, or a key is unknown, missing or of a wrong type or value.
    """
    return checked(read(path, "run in a project directory (vitprune init DIR makes one)"), Params, path)


def read(path: Path, remedy: str) -> dict[str, Any]:
    """Read a YAML file of sections. A key `base` names another file in its directory, whose settings it replaces.

    Args:
        path: The file.
        remedy: What to do if the file is missing, for the error message.

    Raises:
        BadInput: the file or its base is missing, is not YAML, or is not a mapping, or the base has a base itself.
    """
    raw = _mapping(path, remedy)
    if "base" not in raw:
        return raw
    name = raw.pop("base")
    base = _mapping(path.parent / str(name), f"it is the base of {path}; correct its name")
    if "base" in base:
        raise BadInput(f"{path}: base: {name} has a base itself; name a file that has none")
    return overlay(base, raw)


def _mapping(path: Path, remedy: str) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; {remedy}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(raw, dict):
        raise BadInput(f"{path}: must be a mapping of sections, is {type(raw).__name__}")
    return raw


def overlay(base: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with keys of each section replaced; a value below a section replaces the whole value."""
    merged = dict(base)
    for key, value in more.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = {**merged[key], **value} if both else value
    return merged


def checked(raw: Mapping[str, Any], kind: type[SectionType], where: Path | str) -> SectionType:
    """Sections as what they should be; `where` they are from begins the message.

    Raises:
        BadInput: a key is unknown, missing or of a wrong type or value.
    """
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise BadInput(f"{where}: {_first(error)}") from None


def _first(error: ValidationError) -> str:
    """The first error in one line, with its dotted key; of a key that may be of several types, the nearest."""
    problems = [(_dotted(problem["loc"]), problem) for problem in error.errors()]
    for key, problem in problems:
        if problem["type"] == "extra_forbidden" and key in RENAMED:
            return f"{key}: has been renamed to {RENAMED[key]}"
    start = problems[0][0]
    near = [(key, problem) for key, problem in problems if f"{key}.".startswith(f"{start}.")]
    key, problem = max(near, key=lambda pair: (pair[0].count("."), pair[1]["type"] == "value_error"))
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key; remove it or correct its name"
    others = len(problems) - len(near)
    more = f" (and {others} more)" if others else ""
    return f"{key}: {problem['msg']}, got {problem['input']!r}{more}"


# what pydantic puts into an error's place for a type of a union
TYPES = ("constrained-", "dict[", "[key]", "literal[", "list[", "function-", "Schedule")


def _dotted(places: Sequence[int | str]) -> str:
    """The key of an error, without the names that pydantic gives to the types of a union."""
    return ".".join(str(part) for part in places if not str(part).startswith(TYPES))
