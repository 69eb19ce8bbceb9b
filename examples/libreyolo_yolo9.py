"""A detector of your own, complete: LibreYOLO's YOLOv9 as student and as teacher."""

import torch

from tardkd.detectors import dense
from tardkd.detectors.base import Batch, HeadOutputs, HeadSettings, StudentPass, TeacherPass
from tardkd.detectors.listening import recorded_calls, recorded_method


class YOLO9Detector(dense.DenseDetector):  # its head answers for all cells; `model` is a LibreYOLO9Model
    # --- what it is
    channels = property(lambda self: tuple(box_tower[0].conv.in_channels for box_tower in self.model.head.cv2))
    strides = property(lambda self: tuple(self.model.head.stride.tolist()))
    input_size = property(lambda self: self.model.img_size)

    @property
    def head(self):  # a sigmoid for each class, counted from 0, and a box in pixels; its regions are the objects
        bins = self.model.head.reg_max  # of the distribution over each side of a box
        return HeadSettings("last", "sigmoid", (10, 10, 5, 5), (self.model.nc, 4), "boxes", "objects", bins)

    # --- as a student
    def read_call(self, x, targets):  # (N, 3, H, W); (N, G, 5): class or -1, corners as shares of the image
        sides = x.new_tensor([x.shape[3], x.shape[2]] * 2)
        rows = [of_image[of_image[:, 0] >= 0] for of_image in targets]
        objects = [{"labels": row[:, 0].long(), "boxes": row[:, 1:] * sides} for row in rows]
        return Batch(list(x), objects, call={"x": x, "targets": targets})

    def call(self, batch):
        return (output := self.model(**batch.call)), {"total_loss": output["total_loss"]}

    def as_called(self, batch, output, losses):
        return {**output, **losses, "total_loss": sum(losses.values())}

    def student_pass(self, batch, on_inputs=lambda inputs: None):
        x, head = batch.call["x"], self.model.head
        on_inputs(inputs := dense.plain_batch(x))
        criterion = head._get_loss_fn(x.device)
        criterion.update_anchors([x.shape[3], x.shape[2]])  # as the head is going to do: it makes the assigner
        with recorded_calls(head, *head.cv2, *head.cv3) as calls, recorded_method(criterion, "matcher") as matched:
            output, losses = self.call(batch)
        features, scales = calls[head][0][0], [1 / stride for stride in self.strides]
        maps = [torch.cat([calls[tower][1] for tower in towers], 1) for towers in zip(head.cv2, head.cv3)]
        logits, bins, boxes = criterion.vec2box(maps)  # (N, A, K); the distributions, (N, A, 4, bins); (N, A, 4)
        assigned, found = matched[0][1]  # (N, A, K + 4) and (N, A)
        scores, gt_boxes = assigned.split([self.model.nc, 4], dim=2)  # the scores are 0 but for the object's class
        weights, labels = scores.max(2)
        place = dict(levels=dense.level_of_place(maps), grid=dense.cells(maps, scales))
        more = dict(weights=weights, sides=dense.sides_of_cells(bins, maps, scales))
        regions = dense.matched_regions(logits, boxes, found, labels, gt_boxes, **more, **place)
        return StudentPass(losses, inputs, list(batch.targets), features, scales, regions, output)

    # --- as a teacher
    def teacher_pass(self, images, inputs, ratio):
        output = self.model(dense.resized_batch(images, inputs, ratio, next(self.model.parameters()).dtype).tensor)
        features, scales = [output[f"x{side}"]["features"] for side in (8, 16, 32)], [ratio / s for s in self.strides]
        bins, logits = dense.flatten_maps(output["raw_outputs"]).tensor_split([-self.model.nc], dim=2)
        boxes = output["predictions"][:, :4].transpose(1, 2).flatten(0, 1) / ratio
        sides = dense.sides_of_cells(bins.unflatten(2, (4, -1)), features, scales)
        said = HeadOutputs(logits.flatten(0, 1), boxes, sides=sides)
        return TeacherPass(features, scales, said, dense.cells(features, scales))
