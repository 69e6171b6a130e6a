"""Initial weights: random, or layers of a shallower net (§3.1)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from runtime.errors import Refused
from vgg.network.model import CONFIGURATIONS, VGG

Init = Literal["glorot", "kaiming", "normal"]


def initialise(model: VGG, init: Init, seed: int) -> None:
    """Initialise the weights; biases are 0.

    glorot: uniform (Glorot & Bengio 2010; recommended later by the paper's authors).  kaiming: normal with standard
    deviation sqrt(2 / inputs) (He et al. 2015), for inputs with a standard deviation of about 1 (train.standardise).
    normal: N(0, 0.01), standard deviation 0.01; the paper gives a variance of 10^-2, and a deviation of 0.1 does not
    train.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            if init == "glorot":
                nn.init.xavier_uniform_(module.weight, generator=generator)
            elif init == "kaiming":
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu", generator=generator)
            else:
                nn.init.normal_(module.weight, 0.0, 0.01, generator=generator)
            assert module.bias is not None
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()


def for_pixels(
    weights: dict[str, torch.Tensor], source: dict[str, list[float]], target: dict[str, list[float]]
) -> dict[str, torch.Tensor]:
    """Weights of a network for pixels that are prepared in another way; unchanged if it is the same.

    source, target: "mean" and "std" of R, G, B, 0-255, that the network expects, and that it will get.

    The first convolution takes the difference, so that the network answers as before; exactly so where its window does
    not touch the border, for padding stands for the mean.  Weights of torchvision expect deviations of 1, for example:
    without this, a training that only subtracts the mean would feed them numbers 58 times as large.
    """
    if source == target:
        return weights
    before, after = ({part: torch.tensor(of[part]) for part in ("mean", "std")} for of in (source, target))
    kernel = weights["features.0.weight"]
    shift = (after["mean"] - before["mean"]) / before["std"]
    return {
        **weights,
        "features.0.weight": kernel * (after["std"] / before["std"])[:, None, None],
        "features.0.bias": weights["features.0.bias"] + (kernel.sum((2, 3)) * shift).sum(1),
    }


def transplant(model: VGG, shallower: VGG) -> list[str]:
    """Copy four convolutions and the classifier from a shallower net (§3.1).

    "The first four convolutional layers" of net A cannot be copied literally, because A's second convolution has a
    different number of inputs than D's.  The shapes match for: the first convolution of stages 1, 2 and 3 and the
    second of stage 3.  Returns the names of the copied layers.  Raises Refused if a shape differs.
    """
    pairs = [(f"classifier.{i}", f"classifier.{i}") for i in (0, 3, 6)]
    pairs += list(zip(_first_four(shallower), _first_four(model), strict=True))
    ours, theirs = model.state_dict(), shallower.state_dict()
    copied = []
    for source, target in pairs:
        for kind in ("weight", "bias"):
            if theirs[f"{source}.{kind}"].shape != ours[f"{target}.{kind}"].shape:
                raise Refused(
                    f"init 'shallower': {source}.{kind} is {tuple(theirs[f'{source}.{kind}'].shape)} in the shallower "
                    f"net, {target}.{kind} needs {tuple(ours[f'{target}.{kind}'].shape)}. Both nets need the same "
                    "input_size, classifier_width and classes."
                )
            ours[f"{target}.{kind}"] = theirs[f"{source}.{kind}"]
        copied.append(target)
    model.load_state_dict(ours)
    return copied


def _first_four(model: VGG) -> list[str]:
    """Names of the first convolution of stages 1 and 2 and the first two of stage 3."""
    starts, number = [], 0
    names = [f"features.{i}" for i, module in enumerate(model.features) if isinstance(module, nn.Conv2d)]
    for stage in CONFIGURATIONS[model.architecture.configuration]:
        starts.append(number)
        number += len(stage)
    return [names[starts[0]], names[starts[1]], names[starts[2]], names[starts[2] + 1]]
