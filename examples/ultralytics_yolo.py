"""A teacher for Ultralytics' own training of YOLO11 or YOLO26, through callbacks: its trainer stays as it is.

    yolo = YOLO("yolo11n.yaml")
    add_teacher(yolo, YOLO("teacher.pt"))
    yolo.train(data="coco8.yaml", epochs=100)  # to go on: YOLO("last.pt"), add_teacher again, train(resume=True)

last.pt and best.pt are plain YOLO models; what the distillation needs to go on lies beside them, in distill.pt. Several
GPUs are not served: Ultralytics starts processes of its own there, which know nothing of callbacks. Ultralytics is
under the AGPL-3.0: tardkd neither needs nor imports it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from ultralytics import YOLO
from ultralytics.utils.tal import dist2bbox, make_anchors

from tardkd.detectors import dense
from tardkd.detectors.base import Batch, HeadOutputs, HeadSettings, StudentPass, TeacherPass
from tardkd.detectors.listening import recorded_calls
from tardkd.distill import Distiller, DistillSettings


class YOLODetector(dense.DenseDetector):
    """A DetectionModel. As a student it is called as its criterion is: with what it put out, and the batch.

    Args:
        model: the DetectionModel.
        criterion: the student's own, which assigns objects to cells.
    """

    def __init__(self, model: Any, criterion: Any = None) -> None:
        super().__init__(model)
        self.detect, self.criterion = model.model[-1], criterion

    channels = property(lambda self: tuple(tower[0].conv.in_channels for tower in self.detect.cv2))
    strides = property(lambda self: tuple(self.detect.stride.tolist()))
    input_size = property(lambda self: 640)  # images are resized before any model sees them

    @property
    def head(self) -> HeadSettings:
        return HeadSettings("last", "sigmoid", (10, 10, 5, 5), (self.detect.nc, 4), "boxes", "objects")

    def read(self, outputs: Any) -> tuple[list[Tensor], Tensor, Tensor]:
        """Maps, logits (N, A, K) and boxes (N, A, 4) in pixels of its input; of two heads the one-to-many."""
        outputs = outputs[1] if isinstance(outputs, tuple) else outputs
        outputs = outputs.get("one2many", outputs)
        points, strides = make_anchors(outputs["feats"], self.detect.stride, 0.5)
        sides = self.detect.dfl(outputs["boxes"].float())  # from here on float32, also under autocast
        boxes = dist2bbox(sides.transpose(1, 2), points.float(), xywh=False) * strides
        return outputs["feats"], outputs["scores"].transpose(1, 2), boxes

    # --- as a student
    def read_call(self, outputs: Any, batch: dict[str, Any]) -> Batch:
        images, rows = batch["img"], batch["batch_idx"]
        centre, size = (batch["bboxes"] * batch["bboxes"].new_tensor([*images.shape[:1:-1]] * 2)).split(2, dim=1)
        boxes, labels = torch.cat([centre - size / 2, centre + size / 2], 1), batch["cls"].flatten().long()
        targets = [{"boxes": boxes[rows == i], "labels": labels[rows == i]} for i in range(len(images))]
        targets = [{name: values.to(images.device) for name, values in target.items()} for target in targets]
        return Batch(list(images), targets, call={"preds": outputs, "batch": batch})

    def call(self, batch: Batch) -> tuple[Any, dict[str, Tensor]]:
        output = self.criterion(batch.call["preds"], batch.call["batch"])
        return output, {"loss": output[0].sum() / len(batch.images)}  # Ultralytics multiplies it by the batch size

    def as_called(self, batch: Batch, output: Any, losses: dict[str, Tensor]) -> Any:
        loss, items = output
        help_ = sum(value for name, value in losses.items() if name.startswith("distill_"))
        return torch.cat([loss, help_[None] * len(batch.images)]), {**items, "distill_loss": help_.detach()}

    def student_pass(self, batch: Batch, on_inputs: Any = lambda inputs: None) -> StudentPass:
        on_inputs(inputs := dense.plain_batch(batch.call["batch"]["img"]))
        assigner = getattr(self.criterion, "one2many", self.criterion).assigner
        with recorded_calls(assigner) as calls:
            output, losses = self.call(batch)
        labels, gt_boxes, scores, found, _ = calls[assigner][1]
        maps, logits, boxes = self.read(batch.call["preds"])
        scales = [1 / stride for stride in self.strides]
        place = dict(levels=dense.level_of_place(maps), grid=dense.cells(maps, scales))
        regions = dense.matched_regions(
            logits, boxes, found.bool(), labels.long(), gt_boxes, weights=scores.sum(2), **place
        )
        return StudentPass(losses, inputs, list(batch.targets), maps, scales, regions, output)

    # --- as a teacher
    def teacher_pass(self, images: Any, inputs: Any, ratio: float) -> TeacherPass:
        dtype = next(self.model.parameters()).dtype
        maps, logits, boxes = self.read(self.model(dense.resized_batch(images, inputs, ratio, dtype).tensor))
        scales = [ratio / stride for stride in self.strides]
        outputs = HeadOutputs(logits.flatten(0, 1), boxes.flatten(0, 1) / ratio)
        return TeacherPass(maps, scales, outputs, dense.cells(maps, scales))


class Criterion:
    """Ultralytics' criterion with one more loss."""

    def __init__(self, criterion: Any, distiller: Distiller) -> None:
        self.criterion, self.distiller = criterion, distiller

    def __call__(self, outputs: Any, batch: dict[str, Any]) -> Any:
        if torch.is_grad_enabled():
            return self.distiller(outputs, batch)
        loss, items = self.criterion(outputs, batch)  # validation
        return torch.cat([loss, loss.new_zeros(1)]), {**items, "distill_loss": loss.new_zeros(())}

    def __getattr__(self, name: str) -> Any:  # such as YOLO26's update()
        return getattr(self.__dict__["criterion"], name)


def add_teacher(yolo: YOLO, teacher: YOLO, settings: DistillSettings | None = None) -> None:
    """Let the next ``yolo.train(...)`` be helped by ``teacher``, which has the same classes in the same order."""
    settings = settings or DistillSettings()

    def start(trainer: Any) -> None:
        model = trainer.model
        criterion = getattr(model, "criterion", None) or model.init_criterion()
        distiller = Distiller(YOLODetector(model, criterion), YOLODetector(teacher.model), settings)
        distiller.start(trainer.epochs, len(trainer.train_loader))
        if trainer.resume and (trainer.wdir / "distill.pt").exists():
            distiller.load_task_state(torch.load(trainer.wdir / "distill.pt", weights_only=True))
        model.criterion = Criterion(criterion, distiller)
        parameters = list(distiller.adapters.parameters())
        if parameters:
            # An optimizer of their own: in the trainer's they would keep its checkpoints from being resumed. Adam does
            # not mind that gradients are multiplied by the scale of mixed precision.
            adam = torch.optim.Adam(parameters, lr=1e-3)

            def step(*_: Any) -> None:
                if all(p.grad is None or p.grad.isfinite().all() for p in parameters):
                    adam.step()
                adam.zero_grad()

            trainer.optimizer.register_step_post_hook(step)

    def tell_progress(trainer: Any) -> None:
        trainer.model.criterion.distiller.set_progress(trainer.epoch, 0)

    def save(trainer: Any) -> None:
        torch.save(trainer.model.criterion.distiller.task_state(), trainer.wdir / "distill.pt")

    yolo.add_callback("on_train_start", start)
    yolo.add_callback("on_train_epoch_start", tell_progress)
    yolo.add_callback("on_model_save", save)
