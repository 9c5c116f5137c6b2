"""Augmentation: what each training batch of images becomes, so that no image is seen twice alike."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.errors import DataError


def crop_and_flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to an eighth of its sides, edges reflected, and every other one mirrored.

    x (n, channels, height, width) or (n, height, width, channels): of the two axes the one of 1, 3 or 4 is channels

    Source: He et al. 2016 (arXiv 1512.03385), section 4.2, who pad by 4 of 32 pixels.
    """
    if x.dim() != 4 or not ({x.shape[1], x.shape[3]} & {1, 3, 4}):
        raise DataError(f"crop-flip is for images (n, channels, height, width), not for {list(x.shape)}.")
    if x.shape[1] not in (1, 3, 4):
        return crop_and_flip(x.movedim(3, 1), generator).movedim(1, 3)
    count, _, height, width = x.shape
    down, right = max(1, height // 8), max(1, width // 8)
    padded = functional.pad(x, (right, right, down, down), mode="reflect")
    rows = torch.randint(0, 2 * down + 1, (count, 1), generator=generator) + torch.arange(height)
    columns = torch.randint(0, 2 * right + 1, (count, 1), generator=generator) + torch.arange(width)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    taken = padded.permute(0, 2, 3, 1)[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return taken.permute(0, 3, 1, 2).contiguous()


AUGMENTS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {"crop-flip": crop_and_flip}
