"""Detectors from a small description: torchvision's own by name, and a light ResNet-FPN family for CPU work."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, model_validator
from torch import nn
from torchvision.models import detection, get_model_weights, resnet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN, resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FasterRCNN, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.fcos import FCOS
from torchvision.models.detection.retinanet import RetinaNet, RetinaNetHead
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops import MultiScaleRoIAlign as TorchvisionRoIAlign

from tardkd import build_info
from tardkd.detectors import for_model
from tardkd.ops import MultiScaleRoIAlign
from tardkd.train.bounds import Channels, Factor, Layers, Pixels, Regions, Share, Text
from tardkd.train.own_models import REFERENCE, build_own
from tardkd.train.query_models import fill_backbone
from tardkd.weights import MisfitError, Weights, fill, from_content, read

LIGHT = "resnet_fpn"
# What goes with a detector of one's own.
OWN = ("model", "weights", "new_head", "backbone", "backbone_weights", "freeze_norm", "norm_eps")
LIGHT_ONLY = ("head", "blocks", "width", "fpn_channels", "head_dim", "norm", "anchor_sizes", "canonical_scale")
# The keys that go to the constructors of torchvision, by family.
ONE_STAGE = ("score_thresh", "nms_thresh", "detections_per_img", "topk_candidates")
OPTIONS = {
    "faster_rcnn": (
        "min_size",
        "max_size",
        "rpn_pre_nms_top_n_train",
        "rpn_pre_nms_top_n_test",
        "rpn_post_nms_top_n_train",
        "rpn_post_nms_top_n_test",
        "rpn_batch_size_per_image",
        "box_batch_size_per_image",
        "box_detections_per_img",
        "box_score_thresh",
    ),
    "retinanet": ("min_size", "max_size", *ONE_STAGE, "fg_iou_thresh", "bg_iou_thresh"),
    "fcos": ("min_size", "max_size", *ONE_STAGE, "center_sampling_radius"),
    "ssd": (*ONE_STAGE, "iou_thresh", "positive_fraction"),
}
ALL_OPTIONS = tuple(dict.fromkeys(key for keys in OPTIONS.values() for key in keys))
TWO_STAGE_ONLY = ("head_dim", "canonical_scale")  # of the light family
STAGES = (("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",))


class ModelSpec(BaseModel):
    """What detector to build. Settings left at None are torchvision's.

    With ``model`` only ``weights``, ``new_head``, ``freeze_norm`` and ``norm_eps`` go, and with the models of
    ``tardkd.train.query_models`` also ``backbone`` and ``backbone_weights``. The second group goes to
    torchvision's ``FasterRCNN``, the third to its one-stage detectors, under the names that they have there; the last
    is for ``resnet_fpn`` alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    # a detector of your own, package.module:function; it is called with the number of classes, background included
    model: Annotated[str, Field(pattern=f"^{REFERENCE}$")] | None = None
    # one of torchvision's detectors, or resnet_fpn: a light family for CPU work
    name: Literal[
        "resnet_fpn",
        "fasterrcnn_resnet50_fpn",
        "fasterrcnn_resnet50_fpn_v2",
        "fasterrcnn_resnet101_fpn",
        "fasterrcnn_mobilenet_v3_large_fpn",
        "fasterrcnn_mobilenet_v3_large_320_fpn",
        "retinanet_resnet50_fpn",
        "retinanet_resnet50_fpn_v2",
        "fcos_resnet50_fpn",
        "ssd300_vgg16",
        "ssdlite320_mobilenet_v3_large",
    ] = LIGHT
    weights: Text | None = None  # a file to start the whole detector from; DEFAULT: torchvision downloads its own
    new_head: bool = False  # take all but the class and box predictor from weights that are not of the same classes
    # a model of timm's in the place of their ResNet, for tardkd.train.query_models (pip install timm)
    backbone: Annotated[str, Field(pattern=r"^\w+(\.\w+)?$")] | None = None
    backbone_weights: Text | None = None  # a file of a classifier to start the backbone from, or DEFAULT
    freeze_norm: bool = False  # keep BatchNorm constant, as is usual where small batches fine-tune a detector
    norm_eps: NonNegativeFloat | None = None  # BatchNorm's epsilon; torchvision's COCO_V1 files were trained with 0
    frozen_stages: Annotated[int, Field(ge=0, le=5)] = 0  # how many leading ResNet stages are not trained; 1: the stem

    min_size: Pixels | tuple[Pixels, ...] | None = None  # an image's shortest side; of several, one at random
    max_size: Pixels | None = None  # longest side of an image in pixels
    rpn_pre_nms_top_n_train: Regions | None = None  # proposals of each level before suppression, in training
    rpn_pre_nms_top_n_test: Regions | None = None  # the same in evaluation
    rpn_post_nms_top_n_train: Regions | None = None  # proposals of each image after suppression, in training
    rpn_post_nms_top_n_test: Regions | None = None  # the same in evaluation
    rpn_batch_size_per_image: Regions | None = None  # anchors of each image in the losses of the proposals
    box_batch_size_per_image: Regions | None = None  # regions of each image that train the box head
    box_detections_per_img: Regions | None = None  # most detections of an image
    box_score_thresh: Annotated[float, Field(ge=0, lt=1)] | None = None  # least score of a detection

    score_thresh: Annotated[float, Field(ge=0, lt=1)] | None = None  # least score of a detection, before suppression
    nms_thresh: Annotated[float, Field(ge=0, le=1)] | None = None  # most overlap of two detections of a class
    detections_per_img: Regions | None = None  # most detections of an image
    topk_candidates: Regions | None = None  # best detections of each level (SSD: class) before suppression
    fg_iou_thresh: Share | None = None  # RetinaNet: an anchor with this overlap has the object
    bg_iou_thresh: Share | None = None  # RetinaNet: an anchor with less overlap is background
    center_sampling_radius: Factor | None = None  # FCOS: strides from an object's centre within which points have it
    iou_thresh: Share | None = None  # SSD: an anchor with this overlap has the object
    # SSD: share of anchors with an object in the loss
    positive_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None

    head: Literal["faster_rcnn", "retinanet", "fcos"] = "faster_rcnn"  # what stands on the pyramid
    blocks: Annotated[tuple[Layers, ...], Field(min_length=2, max_length=4)] = (2, 2, 2, 2)  # blocks of each stage
    width: Factor = 1.0  # factor of the stages' 64, 128, 256, 512 channels
    fpn_channels: Channels = 256  # channels of every pyramid level
    head_dim: Channels = 1024  # width of the box head's two layers
    norm: Literal["batch", "group"] = "batch"  # statistics of a batch, or of groups of an image's channels
    # pixels, one for each level: stages + 1; RetinaNet's pyramid begins at stride 8, so that it has as many as stages
    anchor_sizes: tuple[Pixels, ...] = (32, 64, 128, 256, 512)
    canonical_scale: Pixels = 224  # pixels; regions of this size are pooled from stride 16, of half of it from 8

    @model_validator(mode="after")
    def _consistent(self) -> ModelSpec:
        if self.model is not None:
            given = [key for key in type(self).model_fields if key not in OWN and self._is_given(key)]
            if given:
                raise ValueError(f"{', '.join(given)}: {self.model} builds the detector, so that it decides these")
            if "DEFAULT" in (self.weights, self.backbone_weights):
                raise ValueError(f"torchvision has no DEFAULT weights for {self.model}")
            if self.backbone_weights and not self.backbone:
                raise ValueError(
                    f"backbone_weights: with {self.model} they are those of a backbone; give backbone, too"
                )
            self._check_weights()
            return self
        if self.backbone:
            raise ValueError(
                f"backbone: {self.name} has its own; only detectors of a function, see model, take another"
            )
        if self.name != LIGHT:
            foreign = [key for key in LIGHT_ONLY if self._is_given(key)]
            if foreign:
                raise ValueError(f"{', '.join(foreign)}: only {LIGHT} takes these, not {self.name}")
        else:
            self._check_light()
        options = OPTIONS[self.family]
        foreign = [key for key in ALL_OPTIONS if key not in options and getattr(self, key) is not None]
        if foreign:
            raise ValueError(f"{', '.join(foreign)}: {self._what} has none of these; it takes {', '.join(options)}")
        if self.backbone_weights and self.family == "ssd":
            raise ValueError(f"backbone_weights: {self.name} is not a classifier with layers on top; see weights")
        if self.frozen_stages and "resnet" not in self.name:
            raise ValueError(f"frozen_stages counts ResNet stages; {self.name} has none")
        if self.frozen_stages > len(self.blocks) + 1:
            raise ValueError(f"frozen_stages: {self.frozen_stages} of {len(self.blocks) + 1} stages")
        if self.norm == "group" and (self.freeze_norm or self.norm_eps is not None):
            raise ValueError("freeze_norm and norm_eps need norm batch, found group")
        if self.frozen_stages and self.norm == "batch" and not self.freeze_norm:
            raise ValueError("frozen_stages needs freeze_norm: true, else their BatchNorm statistics still move")
        self._check_weights()
        if "DEFAULT" in (self.weights, self.backbone_weights) and self.name == LIGHT:
            raise ValueError(f"torchvision has no DEFAULT weights for {LIGHT}")
        return self

    def _check_weights(self) -> None:
        if self.weights and self.backbone_weights:
            raise ValueError("weights already holds the backbone; leave backbone_weights out")

    def _check_light(self) -> None:
        """Raises ValueError where the light family's keys do not go together."""
        if self.family != "faster_rcnn":
            foreign = [key for key in TWO_STAGE_ONLY if self._is_given(key)]
            if foreign:
                raise ValueError(f"{', '.join(foreign)}: {self._what} has no box head")
        if self.family == "fcos":
            if self._is_given("anchor_sizes"):
                raise ValueError("anchor_sizes: FCOS has points in place of anchors")
            if self.fpn_channels % 32:
                raise ValueError(f"fpn_channels: FCOS's head needs a multiple of 32, found {self.fpn_channels}")
            return
        levels = len(self.blocks) + (self.family == "faster_rcnn")
        if len(self.anchor_sizes) != levels:
            raise ValueError(
                f"anchor_sizes must have one size per pyramid level: {len(self.blocks)} stages give "
                f"{levels} levels, found {len(self.anchor_sizes)} sizes"
            )

    @property
    def family(self) -> str:
        """Which of torchvision's constructors builds it."""
        if self.name == LIGHT:
            return self.head
        kind = self.name.partition("_")[0]
        return {"fasterrcnn": "faster_rcnn", "ssd300": "ssd", "ssdlite320": "ssd"}.get(kind, kind)

    @property
    def options(self) -> dict[str, Any]:
        """What the constructor is given beside backbone and classes."""
        return {key: getattr(self, key) for key in OPTIONS[self.family] if getattr(self, key) is not None}

    @property
    def _what(self) -> str:
        return f"{self.name} with head {self.head}" if self.name == LIGHT else self.name

    def _is_given(self, key: str) -> bool:
        """Whether a recipe sets this key to something else than its default."""
        return key in self.model_fields_set and getattr(self, key) != type(self).model_fields[key].default

    @property
    def title(self) -> str:
        """What to call the detector: its name, or the function that builds it."""
        return self.model or self.name

    @property
    def is_light(self) -> bool:
        """Whether it is of the light family."""
        return self.model is None and self.name == LIGHT


def build_model(spec: ModelSpec, num_classes: int, weights: Weights | None = None) -> nn.Module:
    """The detector that ``spec`` describes, for ``num_classes`` classes without the background (labels 1..num_classes).

    Nothing is downloaded unless ``spec.weights`` or ``spec.backbone_weights`` is ``DEFAULT``.

    Args:
        weights: what the file ``spec.weights`` holds, where the caller has read it already.

    Raises:
        CheckpointError: weights that cannot be read.
        OwnModelError: a function of one's own that cannot be called, or builds something else.
        ValueError: weights that do not fit tensor by tensor.
    """
    if spec.model is not None:
        model = build_own(spec.model, num_classes, **({"backbone": spec.backbone} if spec.backbone else {}))
    else:
        model = _build_bare(spec, num_classes)
        if isinstance(model, FasterRCNN):
            _use_our_pool(model, spec)
    if weights is not None or spec.weights:
        load(model, weights or _read(spec.name, spec.weights), new_head=spec.new_head)
    if spec.backbone_weights and spec.model is not None:
        fill_backbone(model, read(spec.backbone_weights))
    elif spec.backbone_weights:
        _load_backbone(model, spec)
    if spec.norm_eps is not None:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = spec.norm_eps
    if spec.freeze_norm:
        freeze_norm(model)
    for name in (name for stage in STAGES[: spec.frozen_stages] for name in stage):
        model.backbone.body[name].requires_grad_(False)
    return model


def _build_bare(spec: ModelSpec, num_classes: int) -> nn.Module:
    """The detector as its family builds it, with random weights."""
    options = spec.options
    if spec.name == LIGHT:
        return _light(spec, num_classes, options)
    if spec.name == "fasterrcnn_resnet101_fpn":
        backbone = resnet_fpn_backbone(
            backbone_name="resnet101", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
        )
        return FasterRCNN(backbone, num_classes + 1, **options)
    constructor = getattr(detection, spec.name)
    return constructor(weights=None, weights_backbone=None, num_classes=num_classes + 1, **options)


def _use_our_pool(model: FasterRCNN, spec: ModelSpec) -> None:
    """Pool by tardkd's op, which is the faster one where it has kernels; torchvision's constructors take their own."""
    pool = model.roi_heads.box_roi_pool
    kind = MultiScaleRoIAlign if has_kernels_everywhere() else TorchvisionRoIAlign
    model.roi_heads.box_roi_pool = kind(
        pool.featmap_names,
        pool.output_size,
        pool.sampling_ratio,
        canonical_scale=spec.canonical_scale,
        canonical_level=pool.canonical_level,
    )


def has_kernels_everywhere() -> bool:
    """Whether the model may run on any device here without falling back to plain PyTorch."""
    return not torch.cuda.is_available() or "cuda" in build_info()["kernel_devices"]


# ---- the light family ----------------------------------------------------------------------------------------------


def _light(spec: ModelSpec, num_classes: int, options: dict[str, Any]) -> nn.Module:
    channels = [_round8(64 * 2**i * spec.width) for i in range(len(spec.blocks))]
    body = _light_body(spec.blocks, channels, nn.BatchNorm2d if spec.norm == "batch" else group_norm)
    first = 1 if spec.family == "faster_rcnn" else 2  # a dense head on stride 4 would have most of its work there
    levels = {f"layer{i}": str(i - first) for i in range(first, len(channels) + 1)}
    backbone = BackboneWithFPN(body, levels, channels[first - 1 :], spec.fpn_channels)
    if spec.family == "retinanet":
        sizes = tuple(tuple(size * 2 ** (third / 3) for third in range(3)) for size in spec.anchor_sizes)
        anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
        head = RetinaNetHead(spec.fpn_channels, 9, num_classes + 1, norm_layer=group_norm)
        return RetinaNet(backbone, num_classes + 1, anchor_generator=anchors, head=head, **options)
    if spec.family == "fcos":
        strides = tuple((8 * 2**level,) for level in range(len(channels)))
        points = AnchorGenerator(strides, ((1.0,),) * len(strides))
        return FCOS(backbone, num_classes + 1, anchor_generator=points, **options)
    return FasterRCNN(
        backbone,
        rpn_anchor_generator=AnchorGenerator(
            tuple((size,) for size in spec.anchor_sizes), ((0.5, 1.0, 2.0),) * len(spec.anchor_sizes)
        ),
        box_head=TwoMLPHead(spec.fpn_channels * 7 * 7, spec.head_dim),
        box_predictor=FastRCNNPredictor(spec.head_dim, num_classes + 1),
        box_roi_pool=TorchvisionRoIAlign(list(levels.values()), output_size=7, sampling_ratio=2),
        **options,
    )


def _light_body(blocks: tuple[int, ...], channels: list[int], norm: Callable[[int], nn.Module]) -> nn.Sequential:
    """A ResNet of BasicBlocks, with torchvision's names: at width 1 a ResNet-18's weights fit."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(3, channels[0], 7, stride=2, padding=3, bias=False),
        bn1=norm(channels[0]),
        relu=nn.ReLU(inplace=True),
        maxpool=nn.MaxPool2d(3, stride=2, padding=1),
    )
    before = channels[0]
    for i, (count, after) in enumerate(zip(blocks, channels, strict=True)):
        stride = 1 if i == 0 else 2
        shortcut = None if i == 0 else nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), norm(after))
        first = resnet.BasicBlock(before, after, stride, shortcut, norm_layer=norm)
        rest = [resnet.BasicBlock(after, after, norm_layer=norm) for _ in range(count - 1)]
        layers[f"layer{i + 1}"] = nn.Sequential(first, *rest)
        before = after
    body = nn.Sequential(layers)
    for module in body.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return body


def group_norm(channels: int) -> nn.GroupNorm:
    """Groups of 8 channels: statistics within an image, so that batches of any size train alike."""
    return nn.GroupNorm(channels // 8, channels)


def _round8(channels: float) -> int:
    return max(8, round(channels / 8) * 8)


# ---- weights -------------------------------------------------------------------------------------------------------


def load(model: nn.Module, weights: Weights, *, new_head: bool = False) -> None:
    """Fill every tensor of the model from `weights`, with none left over; `new_head`: all but the predictor's."""
    class_tensors = for_model(model).class_tensors
    try:
        fill(model, weights, leave_out=class_tensors if new_head else ())
    except MisfitError as error:
        if any(name.startswith(class_tensors) for name in error.fit.of_another_shape):
            raise ValueError(f"{error}; for other classes set new_head: true") from None
        raise


def _load_backbone(model: FasterRCNN, spec: ModelSpec) -> None:
    """The backbone from a classifier, whose last layer is left out."""
    weights = _read(_classifier(spec.name), spec.backbone_weights)
    tensors = weights.tensors
    if spec.name.startswith("fasterrcnn_mobilenet"):
        tensors = {name.removeprefix("features."): value for name, value in tensors.items()}
    own = model.backbone.body.state_dict()
    fill(model.backbone.body, replace(weights, tensors={k: value for k, value in tensors.items() if k in own}))


def _read(name: str, source: str) -> Weights:
    """The weights of a local file, or torchvision's own for the model called `name`."""
    if source != "DEFAULT":
        return read(source)
    try:
        published = get_model_weights(name).DEFAULT
    except ValueError:
        raise ValueError(f"torchvision has no DEFAULT weights for {name}") from None
    return from_content(published.get_state_dict(progress=True), f"torchvision's {name}")


def _classifier(name: str) -> str:
    if name == LIGHT:
        return "resnet18"
    return next(kind for kind in ("resnet50", "resnet101", "mobilenet_v3_large") if kind in name)


def freeze_norm(model: nn.Module) -> None:
    """Replace every BatchNorm2d of ``model`` by a frozen one with the same statistics, scale and shift."""
    for name, child in model.named_children():
        if isinstance(child, nn.BatchNorm2d) and hasattr(child, "act"):
            setattr(model, name, _frozen_by_timm(child))
        elif isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features, eps=child.eps)
            frozen.load_state_dict(child.state_dict(), strict=False)
            setattr(model, name, frozen)
        else:
            freeze_norm(child)


def _frozen_by_timm(norm: nn.BatchNorm2d) -> nn.Module:
    """A frozen copy of a norm of timm's, which is an activation, too."""
    from timm.utils.model import freeze_batch_norm_2d

    return freeze_batch_norm_2d(norm)
