"""Trunks of ImageNet classifiers, from files in a folder that the command is given; nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torchvision.models import mobilenet_v2
from torchvision.ops import FrozenBatchNorm2d


@dataclass(frozen=True)
class Trunk:
    """A classifier without its last layers, of which four parts make the pyramid's levels of stride 4, 8, 16 and 32."""

    file: str  # the name that the file of its weights begins with
    levels: tuple[int, ...]  # which of its parts, counted from 0, give a level
    channels: tuple[int, ...]  # of each of them
    mean: tuple[float, float, float]  # of the images that it was trained with
    std: tuple[float, float, float]  # of the same


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
TRUNKS = {
    "mobilenet_v2": Trunk("mobilenet_v2-", (3, 6, 13, 17), (24, 32, 96, 320), *IMAGENET),
    "efficientnet_lite0": Trunk("efficientnet-lite0-", (3, 4, 6, 8), (24, 40, 112, 320), *HALVES),
    "efficientnet_lite2": Trunk("efficientnet-lite2-", (3, 4, 6, 8), (24, 48, 120, 352), *HALVES),
}


def build_trunk(name: str, frozen: int, folder: Path) -> nn.Sequential:
    """A trunk of TRUNKS with the weights in the folder, from the classifier's first part to the last with a level.

    Its BatchNorm stays as ImageNet left it, as is usual where small batches fine-tune a detector, and so do its leading
    ``frozen`` parts.
    """
    body = _load_trunk(name, folder)
    for part in body[:frozen]:
        part.requires_grad_(False)
    fold_norms(body)
    return body


def _load_trunk(name: str, folder: Path) -> nn.Sequential:
    found = sorted(folder.rglob(f"{TRUNKS[name].file}*.pth"))
    if not found:
        raise FileNotFoundError(f"no file {TRUNKS[name].file}*.pth with the weights of {name} in {folder}")
    state = torch.load(found[0], weights_only=True)
    if name == "mobilenet_v2":
        classifier = mobilenet_v2()
        classifier.load_state_dict(state)
        parts = list(classifier.features)
    else:
        import timm

        classifier = timm.create_model(f"tf_{name}")
        # The file has other names for the same tensors in the same order.
        classifier.load_state_dict(dict(zip(classifier.state_dict(), state.values(), strict=True)))
        parts = [classifier.conv_stem, classifier.bn1, *classifier.blocks]
    body = nn.Sequential(*parts[: TRUNKS[name].levels[-1] + 1])
    _freeze_norms(body)
    return body


def _freeze_norms(module: nn.Module) -> None:
    """Make every BatchNorm a constant scale and shift; timm's have an activation, which stays."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen: nn.Module = FrozenBatchNorm2d(child.num_features, eps=child.eps)
            frozen.load_state_dict({key: value for key, value in child.state_dict().items() if key in _NORM_KEYS})
            setattr(module, name, nn.Sequential(frozen, child.act) if hasattr(child, "act") else frozen)
        else:
            _freeze_norms(child)


_NORM_KEYS = ("weight", "bias", "running_mean", "running_var")


def fold_norms(module: nn.Module) -> None:
    """Put constant norms into the constant convolutions before them: the same function in less time."""
    convolution: nn.Conv2d | None = None
    for name, child in module.named_children():
        norm = child[0] if isinstance(child, nn.Sequential) and len(child) else child
        if isinstance(norm, FrozenBatchNorm2d) and convolution and not convolution.weight.requires_grad:
            _fold(convolution, norm)
            setattr(module, name, nn.Sequential(*child[1:]) if norm is not child else nn.Identity())
        elif isinstance(child, nn.Conv2d):
            convolution = child
        else:
            fold_norms(child)
            convolution = None


def _fold(convolution: nn.Conv2d, norm: FrozenBatchNorm2d) -> None:
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    bias = norm.bias - norm.running_mean * scale
    before = convolution.bias if convolution.bias is not None else torch.zeros_like(bias)
    convolution.weight.data.mul_(scale[:, None, None, None])
    convolution.bias = nn.Parameter(before.data * scale + bias, requires_grad=False)
