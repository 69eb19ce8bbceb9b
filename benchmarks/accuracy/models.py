"""The detectors of the pairs, one of each family, on a classifier's trunk from ImageNet weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.ops import MultiScaleRoIAlign as TorchvisionRoIAlign

from tardkd.ops import MultiScaleRoIAlign
from tardkd.train.models import group_norm

from .trunks import TRUNKS, Trunk, build_trunk


@dataclass(frozen=True)
class Pretrained:
    """A detector on a trunk of TRUNKS."""

    trunk: str
    frozen: int  # leading parts of the trunk that keep ImageNet's weights
    channels: int = 0  # of every level of an own pyramid; SSDLite has none
    head: str = "faster_rcnn"  # a key of HEADS
    head_dim: int = 0  # Faster R-CNN: width of the box head's two layers


@dataclass(frozen=True)
class Geometry:
    """What a data set asks of its detectors: sizes in pixels of the resized image."""

    short: int  # side of the image
    long: int  # at most
    anchors: tuple[float, ...]  # one a level, from stride 4 on
    canonical: float  # regions of this size are pooled from stride 16

    def scaled(self, factor: float) -> Geometry:
        """The same image in so many times the pixels."""
        return Geometry(
            short=round(self.short * factor),
            long=round(self.long * factor),
            anchors=tuple(size * factor for size in self.anchors),
            canonical=self.canonical * factor,
        )


def build_pretrained(settings: Pretrained, geometry: Geometry, num_classes: int, weights: Path) -> nn.Module:
    """A detector of ``num_classes`` classes beside the background, its trunk from a file in the folder ``weights``.

    Pyramid and heads get random weights from torch's generator.
    """
    body = build_trunk(settings.trunk, settings.frozen, weights)
    return HEADS[settings.head](settings, geometry, num_classes, body)


def _faster_rcnn(settings: Pretrained, geometry: Geometry, num_classes: int, body: nn.Sequential) -> FasterRCNN:
    """Four levels, from stride 4 on, and one more for the proposals."""
    trunk = TRUNKS[settings.trunk]
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


# --- one stage: from stride 8 on, as a dense head on stride 4 would have most of its work there ---------------------

ONE_STAGE_STRIDES = (8, 16, 32, 64)


def _retinanet(settings: Pretrained, geometry: Geometry, num_classes: int, body: nn.Sequential) -> RetinaNet:
    """Anchors of three sizes a level, the first as large as those that Faster R-CNN has on that stride."""
    sizes = tuple(tuple(size * 2 ** (third / 3) for third in range(3)) for size in geometry.anchors[1:])
    return RetinaNet(
        _one_stage_pyramid(settings, body),
        num_classes + 1,
        anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
        head=RetinaNetHead(settings.channels, 9, num_classes + 1, norm_layer=group_norm),
        **_transform(settings, geometry),
    )


def _fcos(settings: Pretrained, geometry: Geometry, num_classes: int, body: nn.Sequential) -> FCOS:
    return FCOS(
        _one_stage_pyramid(settings, body),
        num_classes + 1,
        anchor_generator=AnchorGenerator(
            tuple((stride,) for stride in ONE_STAGE_STRIDES), ((1.0,),) * len(ONE_STAGE_STRIDES)
        ),
        score_thresh=0.05,  # as RetinaNet; its own 0.2 would cut off the tail that average precision counts
        **_transform(settings, geometry),
    )


def _one_stage_pyramid(settings: Pretrained, body: nn.Sequential) -> BackboneWithFPN:
    trunk = TRUNKS[settings.trunk]
    levels = {str(part): str(level) for level, part in enumerate(trunk.levels[1:])}
    return BackboneWithFPN(body, levels, list(trunk.channels[1:]), settings.channels)  # and one more, from stride 32


def _transform(settings: Pretrained, geometry: Geometry) -> dict[str, object]:
    trunk = TRUNKS[settings.trunk]
    sizes = {"min_size": geometry.short, "max_size": geometry.long}
    return {**sizes, "image_mean": trunk.mean, "image_std": trunk.std}


def _ssdlite(settings: Pretrained, geometry: Geometry, num_classes: int, body: nn.Sequential) -> SSD:
    """torchvision's SSDLite head on the trunk itself, on strides 8, 16 and 32; boxes of twice the stride and more."""
    trunk = TRUNKS[settings.trunk]
    sizes = geometry.anchors[1:]  # one more than levels, as SSD has boxes between two levels' sizes, too
    boxes = DefaultBoxGenerator([[2]] * len(trunk.levels[1:]), scales=[size / geometry.short for size in sizes])
    return SSD(
        IntermediateLayerGetter(body, {str(part): str(level) for level, part in enumerate(trunk.levels[1:])}),
        boxes,
        size=(_padded(geometry.long), _padded(geometry.short)),
        num_classes=num_classes + 1,
        image_mean=trunk.mean,
        image_std=trunk.std,
        head=SSDLiteHead(list(trunk.channels[1:]), boxes.num_anchors_per_location(), num_classes + 1, group_norm),
    )


def _padded(side: int, multiple: int = 32) -> int:
    return -(-side // multiple) * multiple


# --- queries --------------------------------------------------------------------------------------------------------


def _rt_detr(settings: Pretrained, geometry: Geometry, num_classes: int, body: nn.Sequential) -> nn.Module:
    """transformers' RT-DETRv2 with two decoder layers, on strides 8, 16 and 32."""
    from transformers import RTDetrResNetConfig, RTDetrV2Config, RTDetrV2ForObjectDetection

    trunk, width = TRUNKS[settings.trunk], settings.channels
    stand_in = RTDetrResNetConfig(  # with the trunk's channels, which takes its place
        embedding_size=8, hidden_sizes=list(trunk.channels), depths=[1] * 4, layer_type="basic", out_indices=[2, 3, 4]
    )
    model = RTDetrV2ForObjectDetection(
        RTDetrV2Config(
            backbone_config=stand_in,
            encoder_in_channels=list(trunk.channels[1:]),
            encoder_hidden_dim=width,
            encoder_ffn_dim=2 * width,
            encoder_attention_heads=width // 16,
            d_model=width,
            decoder_in_channels=[width] * 3,
            decoder_ffn_dim=2 * width,
            decoder_layers=2,
            decoder_attention_heads=width // 16,
            num_queries=60,
            num_denoising=30,
            num_labels=num_classes,
            anchor_image_size=[geometry.short, geometry.long],
        )
    )
    model.model.backbone = MaskedTrunk(body, trunk)
    return model


class MaskedTrunk(nn.Module):
    """A trunk as transformers' detectors call theirs, with images in [0, 1] and a mask of where they are."""

    def __init__(self, body: nn.Sequential, trunk: Trunk) -> None:
        super().__init__()
        self.body = IntermediateLayerGetter(body, {str(part): str(part) for part in trunk.levels[1:]})
        self.register_buffer("mean", torch.tensor(trunk.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(trunk.std)[:, None, None], persistent=False)

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Maps (N, C_l, H_l, W_l) of images (N, 3, H, W), each with its mask (N, H_l, W_l) bool."""
        maps = self.body((pixel_values - self.mean) / self.std).values()
        masks = pixel_mask[None].float()
        return [(level, nn.functional.interpolate(masks, level.shape[-2:])[0].bool()) for level in maps]


HEADS: dict[str, Callable[[Pretrained, Geometry, int, nn.Sequential], nn.Module]] = {
    "faster_rcnn": _faster_rcnn,
    "retinanet": _retinanet,
    "fcos": _fcos,
    "ssdlite": _ssdlite,
    "rt_detr": _rt_detr,
}
