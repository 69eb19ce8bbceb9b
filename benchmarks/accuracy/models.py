"""The detectors of the pairs: Faster R-CNN with a pyramid on a classifier's trunk, from ImageNet weights.

The weights are files of classifiers, in a folder that the command is given; nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torchvision.models import mobilenet_v2
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops import MultiScaleRoIAlign as TorchvisionRoIAlign

from tardkd.ops import MultiScaleRoIAlign


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


@dataclass(frozen=True)
class Pretrained:
    """A Faster R-CNN on a trunk of TRUNKS, with an own FPN of four levels and one more for the proposals."""

    trunk: str
    channels: int  # of every level
    head_dim: int  # width of the box head's two layers
    frozen: int  # leading parts of the trunk that keep ImageNet's weights


@dataclass(frozen=True)
class Geometry:
    """What a data set asks of its detectors: sizes in pixels of the resized image."""

    short: int  # side of the image
    long: int  # at most
    anchors: tuple[float, ...]  # one a level
    canonical: float  # regions of this size are pooled from stride 16

    def scaled(self, factor: float) -> Geometry:
        """The same image in so many times the pixels."""
        return Geometry(
            short=round(self.short * factor),
            long=round(self.long * factor),
            anchors=tuple(size * factor for size in self.anchors),
            canonical=self.canonical * factor,
        )


def build_pretrained(settings: Pretrained, geometry: Geometry, num_classes: int, weights: Path) -> FasterRCNN:
    """A detector of ``num_classes`` classes beside the background, its trunk from a file in the folder ``weights``.

    Pyramid and heads get random weights from torch's generator. The trunk's BatchNorm stays as ImageNet left it, as is
    usual where small batches fine-tune a detector.
    """
    trunk = TRUNKS[settings.trunk]
    body = _load_trunk(settings.trunk, weights)
    for part in body[: settings.frozen]:
        part.requires_grad_(False)
    fold_norms(body)
    levels = {str(part): str(level) for level, part in enumerate(trunk.levels)}
    pool = MultiScaleRoIAlign(
        list(levels.values()), output_size=7, sampling_ratio=2, canonical_scale=geometry.canonical
    )
    model = FasterRCNN(
        BackboneWithFPN(body, levels, list(trunk.channels), settings.channels),
        min_size=geometry.short,
        max_size=geometry.long,
        image_mean=trunk.mean,
        image_std=trunk.std,
        rpn_anchor_generator=AnchorGenerator(
            tuple((size,) for size in geometry.anchors), ((0.5, 1.0, 2.0),) * len(geometry.anchors)
        ),
        box_head=TwoMLPHead(settings.channels * 7 * 7, settings.head_dim),
        box_predictor=FastRCNNPredictor(settings.head_dim, num_classes + 1),
        box_roi_pool=TorchvisionRoIAlign(list(levels.values()), output_size=7, sampling_ratio=2),
        rpn_pre_nms_top_n_train=500,
        rpn_pre_nms_top_n_test=300,
        rpn_post_nms_top_n_train=200,
        rpn_post_nms_top_n_test=100,
        box_batch_size_per_image=64,
    )
    model.roi_heads.box_roi_pool = pool  # which torchvision's constructor would refuse, and which is faster
    return model


def _load_trunk(name: str, folder: Path) -> nn.Sequential:
    """The trunk's parts, from the classifier's first to the last that gives a level."""
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
