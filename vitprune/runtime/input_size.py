"""Size of the images that a model takes: from timm's config, or from the attributes of models of other libraries."""

from typing import Any

from timm.models import get_model_input_config
from torch import Tensor, nn

from vitprune.runtime.wrappers import is_timm_model, plain_model

DEFAULT = (3, 224, 224)
SIZE = "vitprune_input_size"  # attribute of a model of another library whose size was given


def set_input_size(model: nn.Module, example_input: Tensor | None) -> None:
    """Record the size of an example (B, C, H, W) in a model that is not timm's; without an example do nothing."""
    plain = plain_model(model)
    if example_input is not None and example_input.dim() == 4 and not is_timm_model(plain):
        setattr(plain, SIZE, tuple(example_input.shape[1:]))


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """Return channels, height and width of a model's images.

    timm's models have a config. Others give the size by `config.image_size` and `config.num_channels` (transformers) or
    `image_size` (torchvision); a model that says nothing takes images of 3 x 224 x 224.
    """
    plain = plain_model(model)
    if SIZE in vars(plain):
        channels, height, width = vars(plain)[SIZE]
        return channels, height, width
    if is_timm_model(plain):
        channels, height, width = get_model_input_config(plain)["input_size"]
        return channels, height, width
    config = vars(plain).get("config")
    config = getattr(config, "vision_config", config)
    size = getattr(config, "image_size", None) or vars(plain).get("image_size") or DEFAULT[1:]
    height, width = _pair(size)
    channels = getattr(config, "num_channels", None) or getattr(config, "in_chans", None) or DEFAULT[0]
    return int(channels), height, width


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, dict):
        return int(size["height"]), int(size["width"])
    return (int(size[0]), int(size[1])) if isinstance(size, list | tuple) else (int(size), int(size))
