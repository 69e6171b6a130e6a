"""Test images at their scales, and the crops that are cut from them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.nn import functional

from vgg.evaluation.modes import GRID, Base, mirrored

Size = tuple[int, int]  # height and width, pixels


def short_side(height: int, width: int, scale: int) -> Size:
    """(height, width) after isotropic rescaling to short side `scale`, pixels."""
    short = min(height, width)
    return max(scale, round(height * scale / short)), max(scale, round(width * scale / short))


def size_at(base: Base, height: int, width: int) -> Size:
    """The size to which an image is resized.  The long side of a centre crop's image is cut off, as torchvision does
    (transforms.Resize); its windows, and so the published results, depend on that pixel."""
    if base.method != "centre_crop":
        return short_side(height, width, base.scale)
    short = min(height, width)
    return int(base.scale * height / short), int(base.scale * width / short)


def sizes_of(bases: Iterable[Base], height: int, width: int) -> list[Size]:
    """All sizes in which an image is needed, each once."""
    return list(dict.fromkeys(size_at(base, height, width) for base in bases))


def resize(images: torch.Tensor, height: int, width: int, kernel: str = "bilinear") -> torch.Tensor:
    """Resize uint8 (n, h, w, 3) to uint8 (n, height, width, 3), antialiased.  kernel: "bilinear" or "bicubic"."""
    if images.shape[1:3] == (height, width):
        return images
    planes = images.permute(0, 3, 1, 2)
    if planes.device.type == "cuda":  # CUDA has no uint8 kernel
        planes = planes.float()
    planes = functional.interpolate(planes, (height, width), mode=kernel, antialias=True, align_corners=False)
    if planes.is_floating_point():
        planes = planes.round().clamp(0, 255).to(torch.uint8)
    return planes.permute(0, 2, 3, 1)


def centre_crop(images: torch.Tensor, side: int) -> torch.Tensor:
    """The central crops, (n, side, side, 3), as torchvision's CenterCrop takes them: offsets rounded half to even."""
    top, left = (round((length - side) / 2) for length in images.shape[1:3])
    return images[:, top : top + side, left : left + side]


def grid_crops(images: torch.Tensor, side: int) -> torch.Tensor:
    """Crops at regular distances, from corner to corner: (n * GRID², side, side, 3), image by image."""
    rows, columns = (
        [round(step * (length - side) / (GRID - 1)) for step in range(GRID)] for length in images.shape[1:3]
    )
    crops = [images[:, top : top + side, left : left + side] for top in rows for left in columns]
    return torch.stack(crops, 1).flatten(0, 1)


def crops_of(base: Base, images: torch.Tensor, side: int) -> torch.Tensor:
    """What the network sees of images at the size of size_at(): the same number for every image, image by image."""
    if base.method == "dense":
        return images
    return centre_crop(images, side) if base.method == "centre_crop" else grid_crops(images, side)


def pixels_seen(bases: Iterable[Base], flip: bool, side: int, height: int, width: int) -> int:
    """Pixels that the network sees of an image, all crops, scales and mirror images together."""
    seen = 0
    for base in bases:
        h, w = size_at(base, height, width)
        once = {"centre_crop": side * side, "dense": h * w, "multi_crop": (GRID * side) ** 2}[base.method]
        seen += once * (2 if mirrored(base.method, flip) else 1)
    return seen
