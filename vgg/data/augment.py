"""From uint8 crops to the input of the network, on the device: flip, RGB shift, mean subtraction."""

from __future__ import annotations

import torch
from torch import nn

# Principal components of RGB over the ImageNet training set, 0-255 (Krizhevsky 2012 §4.1; values of fb.resnet.torch).
# Rows: channels R, G, B.  Columns: components.
EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
EIGENVALUES = (55.46, 4.794, 1.148)


class Prepare(nn.Module):
    """uint8 (n, h, w, 3) RGB crops to (n, 3, h, w) in `dtype`, channels last in memory; computed in float32.

    mean, std: of R, G, B, 0-255.  The paper subtracts the mean without dividing, which is std = 1 (§2.1).
    colour_shift: standard deviation of alpha.
    """

    mean: torch.Tensor
    std: torch.Tensor
    components: torch.Tensor

    def __init__(
        self, mean: list[float], std: list[float], colour_shift: float = 0.0, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.colour_shift, self.dtype = colour_shift, dtype
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)
        components = torch.tensor(EIGENVECTORS) * torch.tensor(EIGENVALUES)
        self.register_buffer("components", components, persistent=False)

    def forward(
        self, images: torch.Tensor, flip: torch.Tensor | None = None, colour: torch.Tensor | None = None
    ) -> torch.Tensor:
        """flip: bool (n,), images to mirror.  colour: float32 (n, 3), standard normal; every pixel of an image is
        shifted by eigenvectors @ (alpha * eigenvalues), with alpha = colour_shift * colour."""
        pixels = images.permute(0, 3, 1, 2).float()
        if flip is not None:
            pixels = torch.where(flip[:, None, None, None], pixels.flip(-1), pixels)
        shift = -self.mean[None, :]
        if colour is not None and self.colour_shift:
            shift = shift + self.colour_shift * colour @ self.components.T
        prepared = (pixels + shift[:, :, None, None]) / self.std[None, :, None, None]
        return prepared.to(self.dtype, memory_format=torch.channels_last)
