"""RT-DETR, RT-DETRv2 and most of D-FINE: their encoder's own detections become the queries of the decoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from tardkd.detectors.answers import best_for
from tardkd.detectors.base import HeadOutputs, InputBatch, Regions, TeacherPass

from .inputs import UNCHANGED, mask_of
from .queries import QueryDetector


class RTDetrDetector(QueryDetector):
    """A teacher answers with its own queries, each object with the best of them.

    It could be given the student's queries in its own decoder, where both have the same grid. We tried that: their
    first boxes are what the student has refined already, so that a teacher with random weights looks as good as the
    student; and of several queries near an object a trained decoder lets one win, seldom the one that the student's
    matcher chose. With planted objects the gates then told nothing of a teacher; with its own queries they do.
    """

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

    def maps(self, output: Any) -> list[Tensor]:
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

    # --- as a teacher

    def teacher_pass(self, images: Sequence[Tensor], inputs: InputBatch, ratio: float) -> TeacherPass:
        batch = self._batch(images, inputs, ratio)
        with any_size(self.model.model):
            output = self.model(pixel_values=batch.tensor, pixel_mask=mask_of(batch), return_dict=True)
        height, width = (side / ratio for side in batch.tensor.shape[-2:])
        return TeacherPass(
            features=self.maps(output),
            scales=[ratio / stride for stride in self.strides],
            state=self.said(output, height, width),
        )

    def answers(self, teacher_pass: TeacherPass, regions: Regions, classes: Tensor) -> HeadOutputs:
        return best_for(teacher_pass.state, regions, classes, self.head)

    def _batch(self, images: Sequence[Tensor], inputs: InputBatch, ratio: float) -> InputBatch:
        """The student's own batch where this model would have made the same, else one of its own."""
        dtype = next(self.model.parameters()).dtype
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
    def heads(self) -> tuple[nn.Module, ...]:
        decoder = self.model.model.decoder
        return decoder.class_embed[-1], decoder.bbox_embed[-1]

    @property
    def class_tensors(self) -> tuple[str, ...]:
        trunk = ("model.denoising_class_embed.", "model.enc_score_head.", "model.decoder.class_embed.")
        return (*trunk, "class_embed.")  # of D-FINE under two names

    # --- in use

    def detect(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        with any_size(self.model.model):
            return super().detect(images)


@contextmanager
def any_size(trunk: Any) -> Iterator[None]:
    """Let a model take inputs of any size in eval mode, also where its configuration names one."""
    named = trunk.config.anchor_image_size
    trunk.config.anchor_image_size = None
    try:
        yield
    finally:
        trunk.config.anchor_image_size = named
