"""RT-DETR, RT-DETRv2 and D-FINE: their encoder's own detections become the queries of the decoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tardkd.detectors.answers import best_for, rows_of
from tardkd.detectors.base import HeadOutputs, InputBatch, Regions, TeacherPass
from tardkd.detectors.listening import recorded_calls

from .inputs import UNCHANGED, mask_of, to_pixels
from .queries import QueryDetector


@dataclass(frozen=True)
class QueryGrid:
    """The cells that queries are chosen from; two are equal where the same cell is the same place in both models."""

    maps: tuple[tuple[int, ...], ...]  # (height, width) of each of the encoder's levels
    cells: int  # of all the decoder's levels
    extent: tuple[float, ...]  # (height, width) of the padded input, in student-input pixels
    chosen: Tensor | None = field(default=None, compare=False)  # (N, Q) int64, the cells that became queries
    references: Tensor | None = field(default=None, compare=False)  # (N, Q, 4), their first boxes before the sigmoid


@dataclass
class Encoded:
    """What a teacher's decoder is going to be called with."""

    call: dict[str, Any]  # its keywords
    memory: Tensor  # (N, cells, C), what queries are made of
    extent: tuple[float, float]  # as of QueryGrid


class RTDetrDetector(QueryDetector):
    """A teacher of the same grid answers with the student's queries in its own decoder, else with its best query.

    So the decoder runs once in either case, after the student has chosen.
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

    def maps(self, output: Any, size: tuple[int, int]) -> list[Tensor]:
        return list(output.encoder_last_hidden_state)

    def first_query(self, output: Any) -> int:
        return output.denoising_meta_values["dn_num_split"][0] if output.denoising_meta_values else 0

    def grid(self, output: Any, inputs: InputBatch) -> QueryGrid:
        references = output.init_reference_points[:, self.first_query(output) :]
        best = output.enc_outputs_class.detach().max(-1).values
        return QueryGrid(
            maps=tuple(tuple(level.shape[-2:]) for level in output.encoder_last_hidden_state),
            cells=best.shape[1],
            extent=tuple(float(side) for side in inputs.tensor.shape[-2:]),
            chosen=best.topk(references.shape[1], dim=1).indices,  # once more, as the model has chosen
            references=references.detach(),
        )

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
        trunk = self.model.model
        with any_size(trunk), without_decoder(trunk) as calls, recorded_calls(trunk.enc_output) as recorded:
            output = trunk(pixel_values=batch.tensor, pixel_mask=mask_of(batch), return_dict=True)
        _, memory = recorded[trunk.enc_output]
        height, width = batch.tensor.shape[-2:]
        extent = (height / ratio, width / ratio)
        maps = list(output.encoder_last_hidden_state)
        return TeacherPass(
            features=maps,
            scales=[ratio / stride for stride in self.strides],
            state=Encoded(calls[0], memory, extent),
            grid=QueryGrid(tuple(tuple(level.shape[-2:]) for level in maps), memory.shape[1], extent),
        )

    def answers(self, teacher_pass: TeacherPass, regions: Regions, classes: Tensor) -> HeadOutputs:
        encoded: Encoded = teacher_pass.state
        grid, call = regions.grid, dict(encoded.call)
        is_shared = grid == teacher_pass.grid
        if is_shared:
            cells = grid.chosen[..., None].expand(-1, -1, encoded.memory.shape[-1])
            call |= {"inputs_embeds": encoded.memory.gather(1, cells), "reference_points": grid.references}
        decoder = self.model.model.decoder
        dtype = next(decoder.parameters()).dtype  # what ran before may have run in another one, under autocast
        decoded = decoder(**{key: _as(value, dtype) for key, value in call.items()})
        outputs = HeadOutputs(
            decoded.intermediate_logits[:, -1].flatten(0, 1),
            to_pixels(decoded.intermediate_reference_points[:, -1].flatten(0, 1), *encoded.extent),
        )
        return rows_of(outputs, regions) if is_shared else best_for(outputs, regions, classes, self.head)

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


def _as(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


# --- a part of the model alone; no trace is left on it ----------------------------------------------------------


class _Nothing:
    """The output of a decoder that has not run: None, whatever is asked for."""

    def __getattr__(self, name: str) -> None:
        return None


@contextmanager
def without_decoder(trunk: Any) -> Iterator[list[dict[str, Any]]]:
    """Record the keywords that the model calls its decoder with, in place of running it."""
    calls: list[dict[str, Any]] = []
    own = vars(trunk.decoder).get("forward")  # somebody else may have put a function of their own onto it

    def record(**keywords: Any) -> _Nothing:
        calls.append(keywords)
        return _Nothing()

    trunk.decoder.forward = record
    try:
        yield calls
    finally:
        del trunk.decoder.forward
        if own is not None:
            trunk.decoder.forward = own


@contextmanager
def any_size(trunk: Any) -> Iterator[None]:
    """Let a model take inputs of any size in eval mode, also where its configuration names one."""
    named = trunk.config.anchor_image_size
    trunk.config.anchor_image_size = None
    try:
        yield
    finally:
        trunk.config.anchor_image_size = named
