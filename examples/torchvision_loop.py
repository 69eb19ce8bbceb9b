"""A plain torchvision training loop, and the five lines that let a teacher help.

    python examples/torchvision_loop.py --backbone resnet34 --out teacher.pt         # the teacher: the loop as it was
    python examples/torchvision_loop.py --backbone resnet18 --out student.pt --teacher teacher.pt

Lines marked with (+) are what distillation adds, beside the teacher itself, and (~) what it changes. The data are
tardkd's built-in scenes, so that nothing has to be downloaded. Both models start from random weights and see few
images: this shows how to write the loop, not what distillation gains.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

from tardkd.data import Scenes, to_float
from tardkd.distill import Distiller, load_teacher_weights  # (+)

SIZE, BATCH = 96, 4


def build(backbone: str, num_classes: int) -> FasterRCNN:
    """A Faster R-CNN for small images, to be trained from scratch; any of torchvision's detectors does as well."""
    body = resnet_fpn_backbone(backbone_name=backbone, weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5)
    return FasterRCNN(
        body,
        min_size=SIZE,
        max_size=SIZE,
        rpn_anchor_generator=AnchorGenerator(tuple((side,) for side in (8, 16, 32, 64, 96)), ((0.5, 1.0, 2.0),) * 5),
        rpn_post_nms_top_n_train=200,
        box_batch_size_per_image=32,
        box_head=TwoMLPHead(body.out_channels * 7 * 7, 128),
        box_predictor=FastRCNNPredictor(128, num_classes + 1),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="a torchvision loop with a teacher")
    parser.add_argument("--backbone", default="resnet18", help="of the model that is trained")
    parser.add_argument("--teacher", metavar="FILE", help="state dict of a resnet34 that was trained by this script")
    parser.add_argument("--out", default="student.pt", help="where the state dict goes")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--images", type=int, default=400)
    args = parser.parse_args()

    torch.manual_seed(0)
    scenes = Scenes(args.images, SIZE, seed=0)
    loader = DataLoader(scenes, BATCH, shuffle=True, drop_last=True, collate_fn=lambda items: tuple(zip(*items)))
    epochs = -(-args.steps // len(loader))
    model = build(args.backbone, len(scenes.class_names))

    teacher = None
    if args.teacher:
        teacher = build("resnet34", len(scenes.class_names))
        load_teacher_weights(teacher, args.teacher)  # (+) unlike load_state_dict it also reads checkpoints
    # The weights are to bring the gradients of the terms near to that of the detector's own losses; `tardkd doctor`
    # measures yours. Without a teacher the distiller is exactly the student. (+)
    distiller = Distiller(model, teacher, enabled=bool(args.teacher))
    distiller.start(epochs, len(loader))  # (+) the weight of all terms falls from epoch to epoch
    # (~) the distiller's parameters: the student's, and a 1x1 convolution where the channels of the two differ
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.005, momentum=0.9, weight_decay=1e-4)

    distiller.train()  # the student; the teacher always stays in eval mode
    began, step = time.perf_counter(), 0
    for epoch in range(epochs):
        for index, (images, targets) in enumerate(loader):
            distiller.set_progress(epoch, index)  # (+)
            losses = distiller(to_float(images), targets)  # (~) was: model(...)
            loss = sum(losses.values())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(distiller.parameters(), 10.0)
            optimizer.step()
            if step % 20 == 0:
                print(f"step {step}:", ", ".join(f"{name} {value.item():.3f}" for name, value in losses.items()))
            step += 1
            if step == args.steps:
                break
    print(f"{step} steps in {time.perf_counter() - began:.0f} s, the last loss {loss.item():.3f}")

    torch.save(model.state_dict(), args.out)  # plainly a torchvision model: no teacher, no adapters


if __name__ == "__main__":
    main()
