"""The ops as torch sees them: schemas, implementations, shapes for tracing. The only file that talks to the dispatcher.

They take and return plain tensors and numbers and know nothing of autograd; ``region.py``, ``roi_align.py`` and
``gaussian.py`` wrap them. Options travel as integers, the index of their name in :data:`checks.CHOICES`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import native
from .checks import accumulation_dtype
from .cuda import CudaKernels
from .maps import flat_size, layout_of

# What runs the ops, by dispatch key. Looked up at every call: tests put other kernels in the place of these.
IMPLEMENTATIONS: dict[str, Any] = {"CPU": native}
if native.cuda_module is not None:
    IMPLEMENTATIONS["CUDA"] = CudaKernels(
        native.cuda_module, lambda device: torch.cuda.current_stream(device).cuda_stream
    )


def defers(op: str, device: torch.device, choices: Sequence[int]) -> bool:
    """Whether that device makes the gradients of a region loss in the backward pass, also where it need not."""
    return IMPLEMENTATIONS[device.type.upper()].defers(op, choices)


_library = torch.library.Library("tardkd", "DEF")

# The regions and what the two models' heads say of them; `upstream` (3, R) is the gradient of the unreduced losses.
_REGIONS = (
    "Tensor regions, Tensor student_logits, Tensor teacher_logits, Tensor student_deltas, Tensor teacher_deltas, "
    "Tensor labels, Tensor gt_boxes, Tensor? region_weights, Tensor? upstream"
)
_ALIGN = "int sampling_ratio, bool aligned, float canonical_scale, int canonical_level"
_LOSS = "int[] choices, float temperature, float beta, float[] box_weights, bool[] wants"
# losses (feature, classification, regression), gates, scores, factors, gradients of logits, deltas and features; those
# of a pyramid as maps.py lays them out. Gradients are to be multiplied by their term's factor.
_RESULTS = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"

SCHEMAS = {
    "region_distill": f"(Tensor[] student_features, Tensor[] teacher_features, {_REGIONS}, float[] student_scales, "
    f"float[] teacher_scales, int[] output_size, {_ALIGN}, {_LOSS}) -> {_RESULTS}",
    "pooled_distill": f"(Tensor student_pooled, Tensor teacher_pooled, {_REGIONS}, {_LOSS}) -> {_RESULTS}",
    "roi_align": f"(Tensor[] features, Tensor regions, float[] scales, int[] output_size, {_ALIGN}) -> Tensor",
    "roi_align_backward": "(Tensor grad_pooled, Tensor regions, SymInt[] sizes, bool[] channels_last, float[] scales, "
    f"{_ALIGN}) -> Tensor",
    # loss, sums of the masks
    "gaussian_feature_loss": "(Tensor[] student_features, Tensor[] teacher_features, Tensor boxes, float[] scales, "
    "float sigma_squared) -> (Tensor, Tensor)",
    "gaussian_feature_loss_backward": "(Tensor[] student_features, Tensor[] teacher_features, Tensor boxes, "
    "float[] scales, float sigma_squared, Tensor mask_sums, Tensor upstream) -> Tensor[]",
}


def _implement(name: str, key: str) -> None:
    _library.impl(name, lambda *arguments: getattr(IMPLEMENTATIONS[key], name)(*arguments), key)


for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema)
    for _key in IMPLEMENTATIONS:
        _implement(_name, _key)


@torch.library.register_fake("tardkd::region_distill", lib=_library)
def _(student_features, teacher_features, regions, student_logits, teacher_logits, student_deltas, *rest):
    choices, wants = rest[-5], rest[-1]
    dtype = accumulation_dtype(student_features[0].dtype)
    reduce = choices[-1] != native.NONE
    results = native.region_results(regions, student_logits, student_deltas, dtype, reduce, wants)
    layout = layout_of(student_features if wants[0] else [])
    return *results, regions.new_empty((flat_size(layout.sizes),), dtype=dtype)


@torch.library.register_fake("tardkd::pooled_distill", lib=_library)
def _(student_pooled, teacher_pooled, regions, student_logits, teacher_logits, student_deltas, *rest):
    choices, wants = rest[-5], rest[-1]
    dtype = accumulation_dtype(student_pooled.dtype)
    reduce = choices[-1] != native.NONE
    results = native.region_results(regions, student_logits, student_deltas, dtype, reduce, wants)
    gradient = native.gradient_like(student_pooled, dtype) if wants[0] else student_pooled.new_empty((0,), dtype=dtype)
    return *results, gradient


@torch.library.register_fake("tardkd::roi_align", lib=_library)
def _(features, regions, scales, output_size, *align):
    return features[0].new_empty((regions.shape[0], features[0].shape[1], *output_size))


@torch.library.register_fake("tardkd::roi_align_backward", lib=_library)
def _(grad_pooled, regions, sizes, channels_last, *rest):
    return grad_pooled.new_empty((flat_size(sizes),))


@torch.library.register_fake("tardkd::gaussian_feature_loss", lib=_library)
def _(student_features, teacher_features, boxes, scales, sigma_squared):
    loss = boxes.new_empty((), dtype=accumulation_dtype(student_features[0].dtype))
    return loss, boxes.new_empty((len(scales),), dtype=torch.float64)


@torch.library.register_fake("tardkd::gaussian_feature_loss_backward", lib=_library)
def _(student_features, *rest):
    return [native.gradient_like(feature, feature.dtype) for feature in student_features]
