"""Comparison of an exported file with the model in torch: several batches, one bound for every precision."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitprune.data.batch_checks import checked_input
from vitprune.errors import BadInput
from vitprune.runtime.messages import first_line
from vitprune.runtime.model_checks import checked_model, float_type
from vitprune.runtime.outputs import main_tensor
from vitprune.runtime.wrappers import is_timm_model

# A file is refused if a logit differs by more than BOUND * (1 + the largest logit): above the rounding errors of its
# precision, below the effect of a wrong weight.
BOUND = {"float32": 1e-3, "float16": 2e-2, "int8": 0.5}


class _MainOutput(nn.Module):
    """A model that returns the main tensor of another one's output."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        return main_tensor(self.model(images))


class ExportError(BadInput):
    """A model that a format cannot represent, or a file that its engine does not run or runs with other logits."""


@dataclass(frozen=True)
class Expected:
    """Images and the logits that torch computes for them.

    Attributes:
        batches: Images (B, C, H, W); the batches differ in B and, for a file with dynamic image sizes, in H and W.
        logits: Logits (B, classes) of each batch, in float32.
    """

    batches: Sequence[Tensor]
    logits: Sequence[Tensor]

    def compare(self, setting: str, run: Callable[[Tensor], Any], precision: str = "float32") -> dict[str, float]:
        """Run every batch through an exported file.

        Args:
            setting: The setting that asked for the file, for messages.
            run: Runs the file on images (B, C, H, W); returns logits (B, classes) as a tensor or an array.
            precision: float32, float16 or int8: a key of BOUND.

        Returns:
            `max_abs_diff`, the largest difference of a logit, and `bound`, which it must not exceed.

        Raises:
            ExportError: the file does not run, or the difference exceeds the bound.
        """
        try:
            results = [torch.as_tensor(run(images)).float() for images in self.batches]
        except Exception as error:  # engines have errors of their own for each cause
            raise ExportError(f"{setting}: the exported file does not run ({first_line(error)})") from None
        pairs = zip(results, self.logits, strict=True)
        difference = max(float((result - logits).abs().max()) for result, logits in pairs)
        bound = BOUND[precision] * (1 + max(float(logits.abs().max()) for logits in self.logits))
        if not difference <= bound:
            raise ExportError(
                f"{setting}: the logits of the exported file differ by {difference:.3g}, more than {bound:.3g}; "
                "the file was deleted"
            )
        return {"max_abs_diff": difference, "bound": bound}


def exportable(model: nn.Module, example_input: Any) -> tuple[nn.Module, Tensor]:
    """Return a copy of a model on the CPU in evaluation mode, with at least float32 weights, and input for it.

    The copy of a model of another library returns one tensor, see `main_tensor`.

    Raises:
        BadInput: the model or the input is refused.
    """
    plain = checked_model(model)
    with torch.inference_mode(False):
        plain = copy.deepcopy(plain).cpu().eval()
    plain = plain.float() if float_type(plain).itemsize < torch.float32.itemsize else plain
    images = checked_input("example_input", example_input, plain).cpu()
    return plain if is_timm_model(plain) else _MainOutput(plain), images


def expected_logits(model: nn.Module, images: Tensor, dynamic_size: bool = False) -> Expected:
    """Compute the logits of the images, of the first one alone and, on request, of it at another size.

    Args:
        model: The model.
        images: Images (B, C, H, W).
        dynamic_size: Also compare an image of twice the height and three times the width.

    Raises:
        ExportError: the model does not accept images of another size.
    """
    batches = [images, images[:1]]
    if dynamic_size:
        batches.append(F.interpolate(images[:1], scale_factor=(2.0, 3.0)))
    with torch.no_grad():
        try:
            return Expected(batches, [main_tensor(model(batch)).float() for batch in batches])
        except Exception as error:  # timm asserts the size of the input
            if not dynamic_size:
                raise
            size = "x".join(map(str, images.shape[2:]))
            raise ExportError(
                f"export.dynamic_size: the model accepts only images of {size} ({first_line(error)}); set it to false, "
                "or create a ViT with dynamic_img_size: true in model.args"
            ) from None


def example_batch(images: Tensor) -> Tensor:
    """Return two images to trace a model with: a batch of one would fix the batch size."""
    return torch.cat([images, images])[:2]
