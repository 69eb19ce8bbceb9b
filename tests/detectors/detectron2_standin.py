"""Models with the interface of Detectron2's, as small as they get, for where it is not installed."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou, roi_align

CLASSES, CHANNELS, SIDE = 3, 4, 16.0


def images() -> list[Tensor]:
    """Two of 64 x 96 and 64 x 64 pixels, 0 to 255."""
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, 64, width, generator=generator) * 255 for width in (96, 64)]


def objects(empty: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    """Boxes and classes of both images; with ``empty`` none of the second."""
    boxes = [torch.tensor([[4.0, 8, 36, 44], [40, 20, 80, 60]]), torch.tensor([[10.0, 5, 50, 60]])]
    classes = [torch.tensor([0, 2]), torch.tensor([1])]
    if empty:
        boxes[1], classes[1] = boxes[1][:0], classes[1][:0]
    return boxes, classes


class Boxes:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Instances:
    def __init__(self, **fields: Any) -> None:
        vars(self).update(fields)

    def has(self, name: str) -> bool:
        return name in vars(self)


class ImageList:
    def __init__(self, tensor: Tensor, image_sizes: list[tuple[int, int]]) -> None:
        self.tensor, self.image_sizes = tensor, image_sizes


def batch(empty: bool = False) -> list[dict[str, Any]]:
    return [
        {"image": image, "instances": Instances(gt_boxes=Boxes(boxes), gt_classes=classes)}
        for image, boxes, classes in zip(images(), *objects(empty))
    ]


class Backbone(nn.Module):
    size_divisibility = 32

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, CHANNELS, 3, 8, 1), nn.Conv2d(CHANNELS, CHANNELS, 3, 2, 1)

    def output_shape(self) -> dict[str, Any]:
        return {f"p{i}": SimpleNamespace(channels=CHANNELS, stride=2**i) for i in (3, 4)}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        fine = self.fine(x)
        return {"p3": fine, "p4": self.coarse(fine)}


class Transform:
    weights = (1.0, 1.0, 1.0, 1.0)

    def apply_deltas(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        size = boxes[:, 2:] - boxes[:, :2]
        centre = boxes[:, :2] + size / 2 + deltas[:, :2] * size
        half = size * deltas[:, 2:].exp() / 2
        return torch.cat([centre - half, centre + half], dim=1)


class Model(nn.Module):
    input_format = "BGR"

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.register_buffer("pixel_mean", torch.tensor([100.0, 110.0, 120.0])[:, None, None])
        self.register_buffer("pixel_std", torch.tensor([50.0, 60.0, 70.0])[:, None, None])

    def pyramid(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = self.pixel_mean.new_zeros(len(batched_inputs), 3, 64, max(x["image"].shape[2] for x in batched_inputs))
        for row, given in zip(batch, batched_inputs):
            row[..., : given["image"].shape[2]] = (given["image"] - self.pixel_mean) / self.pixel_std
        return self.backbone(batch)


class LevelPooler(nn.Module):
    sampling_ratio, aligned = 2, True

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.spatial_scale = scale


class Pooler(nn.Module):
    output_size, canonical_box_size, canonical_level = (3, 3), 1000, 4  # so that all regions are of the first level

    def __init__(self) -> None:
        super().__init__()
        self.level_poolers = nn.ModuleList(LevelPooler(scale) for scale in (1 / 8, 1 / 16))

    def forward(self, maps: list[Tensor], boxes: list[Boxes]) -> Tensor:
        return roi_align(maps[0], [of_image.tensor for of_image in boxes], 3, 1 / 8, 2, True)


class Predictor(nn.Module):
    box2box_transform = SimpleNamespace(weights=(10.0, 10.0, 5.0, 5.0))

    def __init__(self) -> None:
        super().__init__()
        self.cls_score, self.bbox_pred = nn.Linear(8, CLASSES + 1), nn.Linear(8, 4 * CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_score(x), self.bbox_pred(x)


class RoIHeads(nn.Module):
    box_in_features = ("p3", "p4")

    def __init__(self) -> None:
        super().__init__()
        self.box_pooler, self.box_predictor = Pooler(), Predictor()
        self.box_head = nn.Sequential(nn.Flatten(), nn.Linear(9 * CHANNELS, 8))

    def label_and_sample_proposals(self, proposals: list[Any], targets: list[Instances]) -> list[Instances]:
        """Each object, shifted by random pixels, and one region of background."""
        sampled = []
        for target in targets:
            boxes, nothing = target.gt_boxes.tensor, torch.tensor([[0.0, 0.0, 9.0, 9.0]])
            found = Instances(proposal_boxes=Boxes(torch.cat([boxes + 4 * torch.rand_like(boxes), nothing])))
            found.gt_classes = torch.cat([target.gt_classes, torch.tensor([CLASSES])])
            if len(boxes):
                found.gt_boxes = Boxes(torch.cat([boxes, nothing]))
            sampled.append(found)
        return sampled

    def forward(self, features: dict[str, Tensor], targets: list[Instances]) -> dict[str, Tensor]:
        sampled = self.label_and_sample_proposals([], targets)
        maps = [features[name] for name in self.box_in_features]
        pooled = self.box_pooler(maps, [each.proposal_boxes for each in sampled])
        logits, deltas = self.box_predictor(self.box_head(pooled))
        labels = torch.cat([each.gt_classes for each in sampled])
        return {"loss_cls": nn.functional.cross_entropy(logits, labels), "loss_box_reg": deltas.square().mean()}


class ProposalGenerator(nn.Module):
    """Boxes of two sizes at the same places of every image, inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.size = nn.Parameter(torch.tensor([24.0, 40.0]))

    def forward(self, images: Any, features: dict[str, Tensor], targets: None) -> tuple[list[Instances], dict]:
        proposals = []
        for height, width in images.image_sizes:
            sizes = self.size[:, None].expand(2, 2)
            boxes = torch.cat([torch.full((2, 2), 8.0), 8 + sizes], dim=1)
            limits = torch.tensor([width, height, width, height], dtype=boxes.dtype)
            proposals.append(Instances(proposal_boxes=Boxes(boxes.minimum(limits))))
        return proposals, {}


class GeneralizedRCNN(Model):
    def __init__(self) -> None:
        super().__init__()
        self.roi_heads, self.proposal_generator = RoIHeads(), ProposalGenerator()

    def forward(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        return self.roi_heads(self.pyramid(batched_inputs), [given["instances"] for given in batched_inputs])


class AnchorGenerator(nn.Module):
    """Two anchors a cell."""

    strides, offset = (8, 16), 0.0

    def __init__(self) -> None:
        super().__init__()
        base = torch.tensor([[-1.0, -1, 1, 1], [-2, -1, 2, 1]])
        self.cell_anchors = [SIDE * base, 2 * SIDE * base]

    def forward(self, maps: list[Tensor]) -> list[Boxes]:
        boxes = []
        for level, stride, cell in zip(maps, self.strides, self.cell_anchors):
            rows, columns = (torch.arange(side) * float(stride) for side in level.shape[-2:])
            y, x = torch.meshgrid(rows, columns, indexing="ij")
            centres = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)
            boxes.append(Boxes((centres + cell).reshape(-1, 4)))
        return boxes


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logits, self.deltas = nn.Conv2d(CHANNELS, 2 * CLASSES, 1), nn.Conv2d(CHANNELS, 8, 1)

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return [self.logits(level) for level in maps], [0.1 * self.deltas(level) for level in maps]


class RetinaNet(Model):
    head_in_features, num_classes, box2box_transform = ("p3", "p4"), CLASSES, Transform()

    def __init__(self) -> None:
        super().__init__()
        self.head, self.anchor_generator = Head(), AnchorGenerator()

    def label_anchors(self, anchors: list[Boxes], targets: list[Instances]) -> tuple[list[Tensor], list[Tensor]]:
        places = torch.cat([level.tensor for level in anchors])
        labels, boxes = [], []
        for target in targets:
            if not len(target.gt_classes):
                labels.append(torch.full((len(places),), CLASSES))
                boxes.append(torch.zeros_like(places))
                continue
            overlap, which = box_iou(places, target.gt_boxes.tensor).max(1)
            of_image = target.gt_classes[which]
            of_image[overlap < 0.4] = CLASSES
            of_image[(overlap >= 0.4) & (overlap < 0.5)] = -1
            labels.append(of_image)
            boxes.append(target.gt_boxes.tensor[which])
        return labels, boxes

    def forward(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        maps = list(self.pyramid(batched_inputs).values())
        logits, deltas = self.head(maps)
        self.label_anchors(self.anchor_generator(maps), [given["instances"] for given in batched_inputs])
        loss = sum(level.sigmoid().mean() for level in logits)
        return {"loss_cls": loss, "loss_box_reg": sum(level.square().mean() for level in deltas)}


def install(monkeypatch: Any) -> None:
    """Make the models look like Detectron2's, and the one import of it work."""
    for kind in (GeneralizedRCNN, RetinaNet):
        monkeypatch.setattr(kind, "__module__", "detectron2.modeling.meta_arch")
    structures = ModuleType("detectron2.structures")
    structures.Boxes = Boxes  # type: ignore[attr-defined]
    structures.ImageList = ImageList  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "detectron2", ModuleType("detectron2"))
    monkeypatch.setitem(sys.modules, "detectron2.structures", structures)


def build(kind: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return {"rcnn": GeneralizedRCNN, "retinanet": RetinaNet}[kind]()
