"""The ops as torch sees them: schemas, CPU kernels, shapes for tracing. The only file that talks to the dispatcher.

They take and return plain tensors and numbers and know nothing of autograd; ``region.py``, ``roi_align.py`` and
``gaussian.py`` wrap them. Options travel as integers, the index of their name in :data:`checks.CHOICES`.
"""

from __future__ import annotations

import torch

from . import native
from .checks import accumulation_dtype

_library = torch.library.Library("tardkd", "DEF")

# The regions and what the two models' heads say of them; `upstream` (3, R) is the gradient of the unreduced losses.
_REGIONS = (
    "Tensor regions, Tensor student_logits, Tensor teacher_logits, Tensor student_deltas, Tensor teacher_deltas, "
    "Tensor labels, Tensor gt_boxes, Tensor? region_weights, Tensor? upstream"
)
_ALIGN = "int sampling_ratio, bool aligned, float canonical_scale, int canonical_level"
_LOSS = "int[] choices, float temperature, float beta, float[] box_weights, bool[] wants"
# losses (feature, classification, regression), gates, scores, gradients of logits and deltas
_RESULTS = "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor"

SCHEMAS = {
    "region_distill": f"(Tensor[] student_features, Tensor[] teacher_features, {_REGIONS}, float[] student_scales, "
    f"float[] teacher_scales, int[] output_size, {_ALIGN}, {_LOSS}) -> ({_RESULTS}, Tensor[])",
    "pooled_distill": f"(Tensor student_pooled, Tensor teacher_pooled, {_REGIONS}, {_LOSS}) -> ({_RESULTS}, Tensor)",
    "roi_align": f"(Tensor[] features, Tensor regions, float[] scales, int[] output_size, {_ALIGN}) -> Tensor",
    "roi_align_backward": "(Tensor grad_pooled, Tensor regions, SymInt[] sizes, bool channels_last, float[] scales, "
    f"{_ALIGN}) -> Tensor[]",
    "gaussian_feature_loss": "(Tensor[] student_features, Tensor[] teacher_features, Tensor boxes, float[] scales, "
    "float sigma_squared, bool want_grad) -> (Tensor, Tensor[])",
}

for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema)
    _library.impl(_name, getattr(native, _name), "CPU")


@torch.library.register_fake("tardkd::region_distill", lib=_library)
def _(student_features, teacher_features, regions, student_logits, teacher_logits, student_deltas, *rest):
    choices, wants = rest[-5], rest[-1]
    dtype = accumulation_dtype(student_features[0].dtype)
    reduce = choices[-1] != native.NONE
    results = native.region_results(regions, student_logits, student_deltas, dtype, reduce, wants)
    return *results, [native.gradient_like(feature) for feature in student_features] if wants[0] else []


@torch.library.register_fake("tardkd::pooled_distill", lib=_library)
def _(student_pooled, teacher_pooled, regions, student_logits, teacher_logits, student_deltas, *rest):
    choices, wants = rest[-5], rest[-1]
    dtype = accumulation_dtype(student_pooled.dtype)
    reduce = choices[-1] != native.NONE
    results = native.region_results(regions, student_logits, student_deltas, dtype, reduce, wants)
    return *results, native.gradient_like(student_pooled) if wants[0] else student_pooled.new_empty((0,), dtype=dtype)


@torch.library.register_fake("tardkd::roi_align", lib=_library)
def _(features, regions, scales, output_size, *align):
    return features[0].new_empty((regions.shape[0], features[0].shape[1], *output_size))


@torch.library.register_fake("tardkd::roi_align_backward", lib=_library)
def _(grad_pooled, regions, sizes, channels_last, *rest):
    return native.empty_pyramid(grad_pooled, sizes, channels_last, grad_pooled.dtype)


@torch.library.register_fake("tardkd::gaussian_feature_loss", lib=_library)
def _(student_features, teacher_features, boxes, scales, sigma_squared, want_grad):
    loss = boxes.new_empty((), dtype=accumulation_dtype(student_features[0].dtype))
    return loss, [native.gradient_like(feature) for feature in student_features] if want_grad else []
