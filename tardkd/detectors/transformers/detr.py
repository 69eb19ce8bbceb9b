"""DETR and Deformable DETR: their decoder starts from queries that it has learnt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from tardkd.detectors.base import Detections, HeadSettings, InputBatch

from .queries import QueryDetector

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DeformableDetrDetector(QueryDetector):
    """A sigmoid for each class, and a pyramid of the encoder."""

    normalisation = IMAGENET
    nominal_sizes = (800, 1333)  # of the image processor

    @property
    def channels(self) -> tuple[int, ...]:
        return (self.config.d_model,) * len(self.strides)

    @property
    def strides(self) -> tuple[float, ...]:
        """Those of a ResNet's stages, and of the levels that the model puts on top of them."""
        first, count = (8.0, self.config.num_feature_levels) if self.config.num_feature_levels > 1 else (32.0, 1)
        return tuple(first * 2**level for level in range(count))

    def match(self, logits: Tensor, boxes: Tensor, labels: Sequence[Mapping[str, Tensor]]) -> list[tuple[Tensor, ...]]:
        costs = (self.config.class_cost, self.config.bbox_cost, self.config.giou_cost)
        return self._matcher(*costs)({"logits": logits, "pred_boxes": boxes}, labels)

    @property
    def _matcher(self) -> Any:
        from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher

        return DeformableDetrHungarianMatcher

    def maps(self, output: Any, inputs: InputBatch) -> list[Tensor]:
        sequence = output.encoder_last_hidden_state  # (N, places of all levels, C)
        shapes = [[-(-side // int(stride)) for side in inputs.tensor.shape[-2:]] for stride in self.strides]
        counts = [height * width for height, width in shapes]
        if sum(counts) != sequence.shape[1]:
            raise ValueError(
                f"the encoder of this {type(self.model).__name__} has {sequence.shape[1]} places for an input of "
                f"{tuple(inputs.tensor.shape[-2:])}, and maps of strides {self.strides} have {sum(counts)}: backbones "
                "with maps of other strides are not supported"
            )
        return [
            places.transpose(1, 2).unflatten(2, shape) for places, shape in zip(sequence.split(counts, dim=1), shapes)
        ]

    @property
    def heads(self) -> tuple[nn.Module, ...]:
        last = self.config.decoder_layers - 1
        return self.model.class_embed[last], self.model.bbox_embed[last]

    @property
    def class_tensors(self) -> tuple[str, ...]:
        return "class_embed.", "model.decoder.class_embed."  # of models with two stages under two names


class DetrDetector(DeformableDetrDetector):
    """A softmax over the classes and no object, and one map."""

    @property
    def strides(self) -> tuple[float, ...]:
        return (16.0 if getattr(self.config, "dilation", False) else 32.0,)

    @property
    def head(self) -> HeadSettings:
        return replace(super().head, activation="softmax", widths=(self.config.num_labels + 1, 4))

    @property
    def _matcher(self) -> Any:
        from transformers.loss.loss_for_object_detection import HungarianMatcher

        return HungarianMatcher

    @property
    def heads(self) -> tuple[nn.Module, ...]:
        return self.model.class_labels_classifier, self.model.bbox_predictor

    @property
    def class_tensors(self) -> tuple[str, ...]:
        return ("class_labels_classifier.",)

    def post_process(self, output: Any, spans: list[tuple[float, float]]) -> list[Detections]:
        from transformers import DetrImageProcessor

        return DetrImageProcessor().post_process_object_detection(output, threshold=0.0, target_sizes=spans)
