"""params.yaml as pydantic models: unknown keys and wrong values are errors that name the key."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, ValidationError, model_validator

from vitprune.config.prune_config import PruneConfig
from vitprune.config.score_config import ScoreConfig
from vitprune.config.section import Count, Section, Seed, at_key, first_error
from vitprune.config.train_config import DistillConfig, TrainConfig
from vitprune.errors import BadInput
from vitprune.runtime.yaml_files import load_yaml

MAX_THREADS = 1024  # more are a mistake, and exhaust the memory
SectionType = TypeVar("SectionType", bound=Section)
# arguments of timm.create_model, and keys of its pretrained_cfg, that name weights
WEIGHTS_ARGS = ("pretrained", "checkpoint_path", "url", "file", "state_dict", "hf_hub_id", "hf_hub_filename")


class Dataset(Section):
    """Source of the images."""

    source: str
    """digits, folder:PATH, parquet:PATH, wds/PATH or the name of a timm dataset (hfds/...)."""

    classes: list[str] | None = None
    """Class names in the order of their labels; null: those of the source."""

    labels: list[Annotated[int, Field(ge=0)]] | None = None
    """Class of the model for every class of the source, such as [0, 217, 482] for three folders and a model of
    ImageNet; null: the labels of the source."""

    eval_source: str | None = None
    """Second source to evaluate on; null: the eval split of the source, or a part of it."""

    eval_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Fraction of the images used for evaluation if the source has no eval split."""

    skip_limit: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Largest fraction of unreadable images."""

    exif_orientation: bool = True
    """Rotate images by their EXIF orientation; false: use the stored pixels, for a model that was trained so."""


class Model(Section):
    """The architecture."""

    name: str
    """Name of a timm model."""

    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of timm.create_model, without those that name weights."""

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        """Refuse weights that DVC does not track and that no record would name."""
        settings = [("args", self.args)]
        settings += [(f"args.{key}", value) for key, value in self.args.items() if key.startswith("pretrained_cfg")]
        for key, value in settings:
            for name in WEIGHTS_ARGS if isinstance(value, Mapping) else ():
                if name in value:
                    message = "names weights; use dense.start and dense.checkpoint, which are recorded"
                    raise at_key(f"{key}.{name}", message, value[name])
        return self


class Dense(Section):
    """The model to prune: initial weights and training."""

    start: Literal["train", "pretrained", "checkpoint"]
    """Initial weights: random (train), timm's (pretrained), or those of `checkpoint`."""

    checkpoint: Path | None = None
    """For start: checkpoint. A safetensors file with the weights of `model`, or the directory of a saved model, pruned
    or not; `model.args.num_classes` may then be another number of classes. Weights of any type become float32."""

    train: TrainConfig | None = None
    """The training run; null: none. Required for start: train."""


class Calibrate(Section):
    """The calibration set, drawn from the train split."""

    size: Count | None = None
    """Number of images; null: 2000, or all if there are fewer."""

    balance: Literal["class", "uniform"] = "class"
    """class: the same number of images of every class; uniform: every image with the same probability."""


class Evaluate(Section):
    """Measurement of the dense and the final model."""

    batch_size: Count = 64
    """Images per batch."""

    latency_batch: Count = 1
    """Images per batch when latency is measured."""

    latency_runs: Count = 50
    """Timed forward passes of each model."""


class Export(Section):
    """Files to write in addition to the timm directory. Each is compared with the model in torch."""

    onnx: bool = False
    """An ONNX file in float32 with a dynamic batch size."""

    opset: Annotated[int, Field(ge=18)] | None = None
    """Version of ONNX's operators; null: torch's default."""

    dynamic_size: bool = False
    """Height and width of the images are dynamic in all files; for a model that accepts other sizes, as convolutional
    models do and ViTs with dynamic_img_size: true in model.args."""

    fp16: bool = False
    """An ONNX file with weights and activations in float16; images and logits remain float32."""

    int8: bool = False
    """An ONNX file in INT8, calibrated on the calibration set."""

    openvino: bool = False
    """The ONNX file as OpenVINO IR, with float32 weights; needs the extra `engine`."""

    pt2: bool = False
    """A file of torch.export, which torch loads without timm or vitprune."""

    @model_validator(mode="after")
    def _check_onnx(self) -> Self:
        for key in ("fp16", "int8", "openvino"):
            if getattr(self, key) and not self.onnx:
                raise at_key(key, "is made of the ONNX file; set export.onnx to true", True)
        return self


class Params(Section):
    """All settings of a project."""

    seed: Seed = 0
    """Seed of all random numbers."""

    threads: Annotated[int, Field(ge=1, le=MAX_THREADS)] | None = None
    """CPU threads; the last digits of the results depend on it. null: torch's default."""

    dataset: Dataset
    model: Model
    dense: Dense
    calibrate: Calibrate = Calibrate()
    score: ScoreConfig = ScoreConfig()
    prune: PruneConfig
    distill: DistillConfig = DistillConfig()
    evaluate: Evaluate = Evaluate()
    export: Export = Export()

    @property
    def planned_epochs(self) -> str:
        """Number of epochs of every training, as text for a message."""
        trainings = ((self.dense.train, "dense"), (self.prune.finetune, "prune"), (self.distill.train, "distill"))
        planned = {stage: recipe.epochs for recipe, stage in trainings if recipe is not None}
        cycles = f" in each of {self.prune.cycles} cycles" if self.prune.cycles > 1 else ""
        texts = [f"{stage} {epochs}{cycles if stage == 'prune' else ''}" for stage, epochs in planned.items()]
        return ", ".join(texts) or "none"


def load_params(path: Path) -> Params:
    """Read and validate a params.yaml.

    Raises:
        BadInput: the file is missing, is not YAML, or a key is unknown, missing or of a wrong type or value.
    """
    return checked(read_yaml(path, "run in a project directory (vitprune init DIR makes one)"), Params, path)


def read_yaml(path: Path, remedy: str) -> dict[str, Any]:
    """Read a YAML file of sections. Its key `base` names a file in the same directory with the settings that it omits.

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
        raw = load_yaml(path)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; {remedy}") from None
    if not isinstance(raw, dict):
        instead = "but is empty" if raw is None else f"is {type(raw).__name__}"
        raise BadInput(f"{path}: must be a mapping of sections, {instead}")
    return raw


def overlay(base: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with keys of each section replaced; values are replaced as a whole, not merged."""
    merged = dict(base)
    for key, value in more.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = {**merged[key], **value} if both else value
    return merged


def checked(raw: Mapping[str, Any], kind: type[SectionType], where: Path | str) -> SectionType:
    """Validate sections read from YAML.

    Args:
        raw: The sections.
        kind: Their model.
        where: Their file, for the error message.

    Raises:
        BadInput: a key is unknown, missing or of a wrong type or value.
    """
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise BadInput(f"{where}: {first_error(error, kind)}") from None
