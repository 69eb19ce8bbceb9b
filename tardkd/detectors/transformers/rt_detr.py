"""RT-DETR, RT-DETRv2 and most of D-FINE: their encoder's own detections become the queries of the decoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from tardkd.detectors.base import InputBatch

from .inputs import UNCHANGED
from .queries import QueryDetector


class RTDetrDetector(QueryDetector):
    """Its matcher, the maps of its encoder, and where the queries begin that are no noise."""

    normalisation = UNCHANGED

    @property
    def nominal_sizes(self) -> tuple[int, int]:
        named = self.config.anchor_image_size
        if named is None:
            return 640, 640
        return (named, named) if isinstance(named, int) else (min(named), max(named))

    @property
    def channels(self) -> tuple[int, ...]:
        return (self.config.encoder_hidden_dim,) * len(self.config.feat_strides)

    @property
    def strides(self) -> tuple[float, ...]:
        return tuple(float(stride) for stride in self.config.feat_strides)

    # --- as a student

    def match(self, logits: Tensor, boxes: Tensor, labels: Sequence[Mapping[str, Tensor]]) -> list[tuple[Tensor, ...]]:
        from transformers.loss.loss_rt_detr import RTDetrHungarianMatcher

        # D-FINE's loss matches boxes that are clamped; RT-DETR's are between 0 and 1 by a sigmoid.
        return RTDetrHungarianMatcher(self.config)({"logits": logits, "pred_boxes": boxes.clamp(0, 1)}, labels)

    def maps(self, output: Any, inputs: InputBatch) -> list[Tensor]:
        return list(output.encoder_last_hidden_state)

    def first_query(self, output: Any) -> int:
        return output.denoising_meta_values["dn_num_split"][0] if output.denoising_meta_values else 0

    def parts(self, output: Any) -> dict[str, Tensor]:
        """By kind, each over all layers: how many layers there are is not the same in a batch without objects."""
        parts: dict[str, Tensor] = {}
        classes = getattr(self.model.model, "denoising_class_embed", None)
        for name, value in output.loss_dict.items():
            kind = name.split("_aux_")[0].split("_dn_")[0]
            parts[kind] = parts[kind] + value if kind in parts else value
        if classes is not None and not output.denoising_meta_values and "loss_vfl" in parts:
            # Without an object there is no noise to undo; DDP waits for the gradient of every parameter.
            parts["loss_vfl"] = parts["loss_vfl"] + 0 * classes.weight.sum()
        return parts

    def run(self, inputs: InputBatch) -> Any:
        with any_size(self.model.model):
            return super().run(inputs)

    # --- its parts

    @property
    def heads(self) -> tuple[nn.Module, ...]:
        decoder = self.model.model.decoder
        return decoder.class_embed[-1], decoder.bbox_embed[-1]

    @property
    def class_tensors(self) -> tuple[str, ...]:
        trunk = ("model.denoising_class_embed.", "model.enc_score_head.", "model.decoder.class_embed.")
        return (*trunk, "class_embed.")  # of D-FINE under two names


@contextmanager
def any_size(trunk: Any) -> Iterator[None]:
    """Let a model take inputs of any size in eval mode, also where its configuration names one."""
    named = trunk.config.anchor_image_size
    trunk.config.anchor_image_size = None
    try:
        yield
    finally:
        trunk.config.anchor_image_size = named
