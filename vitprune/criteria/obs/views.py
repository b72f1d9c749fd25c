"""More images than there are: after the images as they are, random crops and mirrored ones, as in training."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from vitprune.criteria import Batches
from vitprune.errors import BadInput

AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of a crop, as timm draws them
ONE_SEED = 1 << 20  # batches apart, so that no two batches of no two cycles draw the same


def images_of(
    batches: Batches, number: int, seed: int, owns: Callable[[int], bool] = lambda batch: True
) -> Iterator[tuple[Tensor, Tensor]]:
    """So many images with labels, in batches: first all as they are, then again and again in random views.

    Of them only the batches whose number is `mine`, counted over all turns.

    Raises:
        BadInput: more are wanted than there are, and they are no images that could be cropped.
    """
    given, place = 0, 0
    while given < number:
        for images, labels in batches:
            taken, first = images[: number - given], place < len(batches)
            if owns(place) and len(taken):
                generator = torch.Generator().manual_seed(seed * ONE_SEED + place)
                yield (taken if first else viewed(taken, generator)), labels[: len(taken)]
            given, place = given + len(taken), place + 1


def viewed(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image cropped to a random part (8 to 100 % of its area) and resized, in half of all cases mirrored.

    images (B, C, H, W) as the model reads them.

    Raises:
        BadInput: they have another shape.

    Source: timm's RandomResizedCrop, which CAP's gradients are taken through.
    """
    if images.dim() != 4:
        raise BadInput(f"score.gradients: inputs of shape {list(images.shape[1:])} have no crops; ask for fewer")
    return torch.stack([_view(image, generator) for image in images])


def _view(image: Tensor, generator: torch.Generator) -> Tensor:
    height, width = image.shape[1:]
    area, ratio, down, right, side = torch.rand(5, generator=generator).tolist()
    share = (AREA[0] + area * (AREA[1] - AREA[0])) * height * width
    aspect = RATIO[0] * (RATIO[1] / RATIO[0]) ** ratio
    h, w = (min(most, max(1, round((share * by) ** 0.5))) for most, by in ((height, 1 / aspect), (width, aspect)))
    top, left = round(down * (height - h)), round(right * (width - w))
    part = image[None, :, top : top + h, left : left + w]
    whole = F.interpolate(part, (height, width), mode="bicubic", antialias=True)[0]
    return whole.flip(2) if side < 0.5 else whole
