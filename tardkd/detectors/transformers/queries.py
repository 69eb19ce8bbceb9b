"""What transformers' detectors share that match a set of queries with the objects: DETR and all that came of it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tardkd.detectors.answers import best_for
from tardkd.detectors.base import (
    Batch,
    Detections,
    Detector,
    HeadOutputs,
    HeadSettings,
    InputBatch,
    Regions,
    Sides,
    StudentPass,
    TeacherPass,
)

from .deploy import OneImageDetector
from .inputs import Preparation, ReadCall, labels_from_zero, mask_of, sizes_in, to_pixels, to_shares


class QueryDetector(Detector):
    """Its regions are the objects, each with the query of the last decoder layer that the model's matcher gave it.

    As a teacher it answers with its own queries, each object with the best of them. It could be given the student's
    queries in its own decoder, where both have the same grid. We tried that with RT-DETR: their first boxes are what
    the student has refined already, so that a teacher with random weights looks as good as the student; and of several
    queries near an object a trained decoder lets one win, seldom the one that the student's matcher chose. With planted
    objects the gates then told nothing of a teacher; with its own queries they do.

    It is called by the keywords of the model's own ``forward``, or with images and targets as torchvision's detectors
    are. What transformers reads and returns counts labels from 0. What is called as torchvision's models are is in
    torchvision's terms: labels of ``targets`` and those of :meth:`tardkd.detectors.base.Detector.detect` count from 1.

    Args:
        model: one of transformers' models for object detection.
        mean, std: of the normalisation that ``pixel_values`` have gone through, one value a channel.
        min_size, max_size: pixels of the shorter and at most of the longer side that images are resized to where they
            come as images and not as ``pixel_values``. Without them it is what the model's image processor aims at.
    """

    model: Any
    normalisation: tuple[tuple[float, ...], tuple[float, ...]]  # mean and std where none are given

    def __init__(
        self,
        model: nn.Module,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        min_size: int | None = None,
        max_size: int | None = None,
    ) -> None:
        super().__init__(model)
        own_mean, own_std = self.normalisation
        shorter, longer = self.nominal_sizes
        if min_size is not None and max_size is None:
            longer = round(min_size * longer / shorter)
        self.preparation = Preparation(
            tuple(own_mean if mean is None else mean),
            tuple(own_std if std is None else std),
            min_size or shorter,
            max_size or longer,
        )

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    @property
    @abstractmethod
    def nominal_sizes(self) -> tuple[int, int]:
        """min_size and max_size where none are given."""

    @property
    def input_size(self) -> float:
        return self.preparation.min_size

    @property
    def head(self) -> HeadSettings:
        return HeadSettings(
            background="last",
            activation="sigmoid",
            box_weights=(10.0, 10.0, 5.0, 5.0),
            widths=(self.config.num_labels, 4),
            box_coding="boxes",
            regions="objects",
        )

    # --- what a family adds

    @abstractmethod
    def match(self, logits: Tensor, boxes: Tensor, labels: Sequence[Mapping[str, Tensor]]) -> list[tuple[Tensor, ...]]:
        """The model's own assignment: for each image the queries (G,) and their objects (G,), int64 on the CPU.

        Args:
            logits: (N, Q, K) of the last decoder layer.
            boxes: (N, Q, 4) centre and size, as shares of the input.
            labels: N dicts with "class_labels" (G,) and "boxes" (G, 4), as the model takes them.
        """

    @abstractmethod
    def maps(self, output: Any, inputs: InputBatch) -> list[Tensor]:
        """The encoder's pyramid, L x (N, C, H_l, W_l), in what the model returned for these inputs."""

    def first_query(self, output: Any) -> int:
        """How many queries of an output come before those that are matched."""
        return 0

    def sides(self, output: Any, height: float, width: float) -> Sides | None:
        """Distributions of the boxes of all matched N x Q queries, in an input of this size; None: it has none."""
        return None

    def said(self, output: Any, height: float, width: float) -> HeadOutputs:
        """What all N x Q queries that are matched say, image after image; boxes in an input of this size."""
        first = self.first_query(output)
        logits, boxes = output.logits[:, first:].flatten(0, 1), output.pred_boxes[:, first:].flatten(0, 1)
        return HeadOutputs(logits, to_pixels(boxes, height, width), sides=self.sides(output, height, width))

    def parts(self, output: Any) -> dict[str, Tensor]:
        """The losses () that add up to the model's, under names that are the same in every step."""
        return {"loss": output.loss}

    # --- as a student

    def read_call(self, *args: Any, **kwargs: Any) -> ReadCall:
        if "images" in kwargs or (args and isinstance(args[0], (list, tuple))):
            return self._read_images(*args, **kwargs)
        return self._read_keywords(**dict(zip(("pixel_values", "pixel_mask"), args)), **kwargs)

    def _read_images(self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]]) -> ReadCall:
        """A call as of torchvision's detectors; its targets count labels from 1."""
        dtype = _dtype(self.model)
        inputs = self.preparation.batch(images, dtype)
        exact = torch.promote_types(dtype, torch.float32)
        labels, read = [], []
        classes = labels_from_zero(targets, self.config.num_labels)
        for image, size, target, of_image in zip(images, inputs.sizes, targets, classes):
            boxes = target["boxes"].to(exact)
            factor = boxes.new_tensor([size[1] / image.shape[-1], size[0] / image.shape[-2]]).repeat(2)
            shares = to_shares(boxes * factor, *inputs.tensor.shape[-2:])
            labels.append({"class_labels": of_image, "boxes": shares})
            read.append({**target, "labels": of_image})
        call = {"pixel_values": inputs.tensor, "pixel_mask": mask_of(inputs), "labels": labels}
        return ReadCall(images, read, call, inputs=inputs, by_keywords=False)

    def _read_keywords(
        self, *, return_dict: bool | None = None, labels: Sequence[Mapping[str, Tensor]] | None = None, **call: Any
    ) -> ReadCall:
        """A call of the model's own ``forward``."""
        pixels = call.get("pixel_values")
        if not isinstance(pixels, Tensor) or labels is None:
            raise ValueError(
                f"a {type(self.model).__name__} that trains is called with pixel_values (N, 3, H, W) and labels, N "
                "dicts with class_labels and boxes; or with images and targets, as torchvision's detectors are"
            )
        height, width = pixels.shape[-2:]
        mask = call.get("pixel_mask")
        sizes = [(height, width)] * len(pixels) if mask is None else sizes_in(mask)
        inputs = InputBatch(pixels, sizes, self.preparation.mean, self.preparation.std)
        targets = [
            {"boxes": to_pixels(target["boxes"], height, width), "labels": target["class_labels"]} for target in labels
        ]
        return ReadCall(
            self.preparation.images(inputs),
            targets,
            {**call, "labels": labels},
            inputs=inputs,
            by_keywords=True,
            wants_tuple=return_dict is False,
        )

    def call(self, batch: Batch) -> tuple[Any, dict[str, Tensor]]:
        assert batch.call is not None, "read_call has read this batch"
        output = self.model(**batch.call, return_dict=True)
        return output, self.parts(output)

    def student_pass(self, batch: Batch, on_inputs: Callable[[InputBatch], None] = lambda inputs: None) -> StudentPass:
        assert isinstance(batch, ReadCall) and batch.call is not None, "read_call has read this batch"
        inputs, labels = batch.inputs, batch.call["labels"]
        height, width = inputs.tensor.shape[-2:]
        on_inputs(inputs)
        output, losses = self.call(batch)
        targets = [
            {"boxes": to_pixels(target["boxes"], height, width), "labels": target["class_labels"]} for target in labels
        ]
        return StudentPass(
            losses=losses,
            inputs=inputs,
            targets=targets,
            features=self.maps(output, inputs),
            scales=[1 / stride for stride in self.strides],
            regions=self._regions(output, inputs, labels, targets),
            output=output,
        )

    def _regions(
        self,
        output: Any,
        inputs: InputBatch,
        labels: Sequence[Mapping[str, Tensor]],
        targets: Sequence[Mapping[str, Tensor]],
    ) -> Regions:
        """The objects of the batch, and what the queries say that they were matched with."""
        first = self.first_query(output)
        logits, boxes = output.logits[:, first:], output.pred_boxes[:, first:]
        with torch.no_grad():
            matches = self.match(logits, boxes, labels)
        device = logits.device
        queries = [of_image.to(device) for of_image, _ in matches]
        objects = [of_image.to(device) for _, of_image in matches]
        objects_of = [target["boxes"][chosen] for target, chosen in zip(targets, objects)]
        rows = torch.cat(queries)
        counts = torch.tensor([len(of_image) for of_image in queries], device=device)
        image_of_row = torch.arange(len(queries), device=device).repeat_interleave(counts, output_size=len(rows))
        flat = image_of_row * logits.shape[1] + rows
        # An index into all rows, where two indices would need a sum over repeated ones backwards.
        head = self.said(output, *inputs.tensor.shape[-2:])[flat]
        return Regions(
            objects_of,
            torch.cat([target["labels"][chosen] for target, chosen in zip(targets, objects)]),
            torch.cat(objects_of),
            head,
        )

    def as_called(self, batch: Batch, output: Any, losses: dict[str, Tensor]) -> Any:
        assert isinstance(batch, ReadCall), "read_call has read this batch"
        if not batch.by_keywords:
            return losses
        terms = {name: value for name, value in losses.items() if name.startswith("distill_")}
        if terms:
            output = replace(
                output, loss=output.loss + sum(terms.values()), loss_dict={**(output.loss_dict or {}), **terms}
            )
        return output.to_tuple() if batch.wants_tuple else output

    # --- as a teacher

    def teacher_pass(self, images: Sequence[Tensor], inputs: InputBatch, ratio: float) -> TeacherPass:
        batch = self._batch(images, inputs, ratio)
        output = self.run(batch)
        height, width = (side / ratio for side in batch.tensor.shape[-2:])
        return TeacherPass(
            features=self.maps(output, batch),
            scales=[ratio / stride for stride in self.strides],
            state=self.said(output, height, width),
        )

    def answers(self, teacher_pass: TeacherPass, regions: Regions, classes: Tensor) -> HeadOutputs:
        return best_for(teacher_pass.state, regions, classes, self.head)

    def run(self, inputs: InputBatch) -> Any:
        """The model's output for a batch, without objects to learn from."""
        return self.model(pixel_values=inputs.tensor, pixel_mask=mask_of(inputs), return_dict=True)

    def _batch(self, images: Sequence[Tensor], inputs: InputBatch, ratio: float) -> InputBatch:
        """The student's own batch where this model would have made the same, else one of its own."""
        dtype = _dtype(self.model)
        if ratio == 1 and self.preparation.fits(inputs):
            return InputBatch(inputs.tensor.to(dtype), inputs.sizes, inputs.mean, inputs.std)
        sizes = [(round(height * ratio), round(width * ratio)) for height, width in inputs.sizes]
        padded = self.preparation.padded(*(side * ratio for side in inputs.tensor.shape[-2:]))
        return self.preparation.batch(images, dtype, sizes, padded)

    # --- its parts

    @property
    def backbone(self) -> nn.Module:
        return self.model.model.backbone

    @property
    def pyramid(self) -> nn.Module:
        return self.model.model.encoder

    @property
    def longest_aspect(self) -> float:
        return 0.99 * self.preparation.max_size

    def input_scale(self, sizes: Tensor) -> Tensor:
        prepared = [self.preparation.size(height, width) for width, height in sizes.tolist()]
        return sizes.new_tensor([(width, height) for height, width in prepared]).reshape(-1, 2) / sizes

    # --- in use

    def detect(self, images: Sequence[Tensor]) -> list[Detections]:
        inputs = self.preparation.batch(images, _dtype(self.model))
        output = self.run(inputs)
        height, width = inputs.tensor.shape[-2:]
        # Boxes are shares of the padded input, which is that many pixels of the image as it was given.
        spans = [
            (height * image.shape[-2] / size[0], width * image.shape[-1] / size[1])
            for image, size in zip(images, inputs.sizes)
        ]
        found = self.post_process(output, spans)
        for detections, image in zip(found, images):
            detections["labels"] = detections["labels"] + 1
            limits = detections["boxes"].new_tensor([image.shape[-1], image.shape[-2]]).repeat(2)
            detections["boxes"] = detections["boxes"].clamp(min=0).minimum(limits)
        return found

    def deployable(self) -> nn.Module:
        """A copy that is called with a list of one image; it can be traced, but not scripted."""
        return OneImageDetector(self.model, self.preparation, self.head.activation)

    def post_process(self, output: Any, spans: list[tuple[float, float]]) -> list[Detections]:
        """The model's own detections, with labels from 0, in inputs of these (height, width)."""
        from transformers import RTDetrImageProcessor

        return RTDetrImageProcessor().post_process_object_detection(output, threshold=0.0, target_sizes=spans)


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype
