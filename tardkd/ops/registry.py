"""The ops as torch sees them: schemas, implementations, shapes for tracing. The only file that talks to the dispatcher.

The registered ops take and return plain tensors, numbers and names, and know nothing of autograd; ``autograd.py`` calls
them. Their schemas follow from the named tuples that pack their arguments, so that a new setting needs no word here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from .checks import accumulation_dtype
from .cpu import CpuKernels
from .cuda import CudaKernels
from .extension import native_module
from .inputs import (
    AlignBackward,
    AlignCall,
    DistributionBackward,
    DistributionCall,
    GaussianBackward,
    GaussianCall,
    RegionBackward,
    RegionCall,
    RegionInputs,
    RegionResults,
)
from .kernels import Kernels
from .maps import flat_size, layout_of
from .results import distribution_results, gradient_like, new_norms, packed_pooled, region_results
from .spec import LossSpec, RoIAlignSpec

# What runs the ops, by dispatch key. Looked up at every call: tests put other kernels in the place of these.
IMPLEMENTATIONS: dict[str, Kernels] = {"CPU": CpuKernels(native_module)}
if hasattr(native_module, "cuda"):  # else built without CUDA kernels
    IMPLEMENTATIONS["CUDA"] = CudaKernels(
        native_module.cuda, lambda device: torch.cuda.current_stream(device).cuda_stream
    )


def needs_dispatch(device: torch.device, tensors: Iterable[Tensor | None]) -> bool:
    """Whether the dispatcher has more to do than to find the kernels, on which it spends more time than some of them.

    It has where a mode, the profiler, a trace or a transform looks on, and where a tensor is not one of torch's own.
    """
    return (
        torch.compiler.is_compiling()  # first: a compiler follows none of the others
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd._profiler_enabled()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or device.type.upper() not in IMPLEMENTATIONS
        or not PLAIN.issuperset(map(type, tensors))
    )


PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, NoneType))


def kernels_of(device: torch.device) -> Kernels:
    return IMPLEMENTATIONS.get(device.type.upper(), IMPLEMENTATIONS["CPU"])  # "meta" goes by the CPU's habits


# --- schemas ----------------------------------------------------------------------------------------------------------

SCALARS = {int: "int", bool: "bool", float: "float", Tensor: "Tensor"}


def schema_of(fields: type) -> str:
    """The fields of a named tuple as arguments of an op."""
    return ", ".join(f"{schema_type(hint)} {name}" for name, hint in get_type_hints(fields).items())


def schema_type(hint: Any) -> str:
    """A type as torch's schemas write it: choices are strings, sequences lists, and None makes a tensor optional."""
    if hint in SCALARS:
        return SCALARS[hint]
    if get_origin(hint) is Literal:
        return "str"
    if get_origin(hint) in (tuple, list, Sequence):
        return f"{SCALARS[get_args(hint)[0]]}[]"
    [present] = [kind for kind in get_args(hint) if kind is not NoneType]
    return f"{schema_type(present)}?"


_INPUTS, _LOSS, _ALIGN = schema_of(RegionInputs), schema_of(LossSpec), schema_of(RoIAlignSpec)
_REGION = f"{_INPUTS}, Tensor? upstream, bool[] wants, {_LOSS}"
_GAUSSIAN, _DISTRIBUTION = schema_of(GaussianCall), schema_of(DistributionCall)
_RESULTS = f"({', '.join('Tensor' for _ in RegionResults._fields)})"

SCHEMAS = {
    "region_distill": f"(Tensor[] student_features, Tensor[] teacher_features, {_REGION}, float[] student_scales, "
    f"float[] teacher_scales, {_ALIGN}) -> {_RESULTS}",
    "region_distill_backward": "(Tensor grad_pooled, Tensor gates, Tensor? factor, Tensor[] student_features, "
    f"Tensor proposals, Tensor? levels, float[] scales, {_ALIGN}) -> Tensor",
    "region_distill_add": f"(Tensor(a!)[] gradients, Tensor[] student_features, Tensor[] teacher_features, {_REGION}, "
    f"float[] student_scales, float[] teacher_scales, {_ALIGN}) -> ()",
    "pooled_distill": f"(Tensor student_pooled, Tensor teacher_pooled, {_REGION}) -> {_RESULTS}",
    "head_distill": f"({_REGION}) -> {_RESULTS}",
    "scale_gradients": "(Tensor(a!)[] results, Tensor[] gradients, Tensor factors, Tensor[] upstream, int[] terms) "
    "-> ()",
    "channel_norms": "(Tensor[] features) -> Tensor",
    "roi_align": f"(Tensor[] features, Tensor proposals, Tensor? levels, float[] scales, {_ALIGN}) -> Tensor",
    "roi_align_backward": "(Tensor grad_pooled, Tensor proposals, Tensor? levels, SymInt[] sizes, "
    f"bool[] channels_last, float[] scales, {_ALIGN}) -> Tensor",
    "gaussian_feature_loss": f"({_GAUSSIAN}) -> (Tensor, Tensor)",
    "gaussian_feature_loss_backward": f"({_GAUSSIAN}, Tensor mask_sums, Tensor upstream) -> Tensor[]",
    "distribution_distill_loss": f"({_DISTRIBUTION}) -> (Tensor, Tensor)",
    "distribution_distill_loss_backward": f"({_DISTRIBUTION}, Tensor upstream) -> Tensor",
}

REGION_OPS = ("region_distill", "pooled_distill", "head_distill")

_library = torch.library.Library("tardkd", "DEF")


def run_kernels(name: str, key: str, packed: Sequence[Any]) -> Any:
    """An op's kernels of a dispatch key, on the arguments that the registered op has."""
    kernels = getattr(IMPLEMENTATIONS[key], name)
    if name == "region_distill_add":
        return kernels(packed[0], *RegionCall.unpack(packed[1:]))
    return kernels(*(RegionCall.unpack(packed) if name in REGION_OPS else packed))


def _implement(name: str, key: str) -> None:
    _library.impl(name, lambda *packed: run_kernels(name, key, packed), key)


for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema)
    for _key in IMPLEMENTATIONS:
        _implement(_name, _key)


# --- shapes for tracing -----------------------------------------------------------------------------------------------


@torch.library.register_fake("tardkd::region_distill", lib=_library)
def _(*packed):
    call, wants, _ = RegionCall.unpack(packed)
    first, proposals = call.student_features[0], call.inputs.proposals
    dtype = accumulation_dtype(first.dtype)
    if wants.features and call.pooling is not None and kernels_of(proposals.device).leaves_pixels(call):
        bins = call.pooling.align.output_size
        return region_results(call, wants, packed_pooled(call.student_features, proposals.shape[0], bins, dtype))
    layout = layout_of(call.student_features if wants.features else [])
    return region_results(call, wants, first.new_empty((flat_size(layout.sizes),), dtype=dtype))


@torch.library.register_fake("tardkd::region_distill_backward", lib=_library)
def _(*packed):
    features = RegionBackward.unpack(packed).student_features
    return features[0].new_empty((flat_size(layout_of(features).sizes),))


@torch.library.register_fake("tardkd::region_distill_add", lib=_library)
@torch.library.register_fake("tardkd::scale_gradients", lib=_library)
def _(*packed):
    pass


@torch.library.register_fake("tardkd::pooled_distill", lib=_library)
def _(*packed):
    call, wants, _ = RegionCall.unpack(packed)
    [student], dtype = call.student_features, accumulation_dtype(call.student_features[0].dtype)
    gradient = gradient_like(student, dtype) if wants.features else student.new_empty((0,), dtype=dtype)
    return region_results(call, wants, gradient)


@torch.library.register_fake("tardkd::head_distill", lib=_library)
def _(*packed):
    call, wants, _ = RegionCall.unpack(packed)
    logits = call.inputs.student_logits
    return region_results(call, wants, logits.new_empty((0,), dtype=accumulation_dtype(logits.dtype)))


@torch.library.register_fake("tardkd::channel_norms", lib=_library)
def _(features):
    return new_norms(features)


@torch.library.register_fake("tardkd::roi_align", lib=_library)
def _(*packed):
    call = AlignCall.unpack(packed)
    shape = (call.proposals.shape[0], call.features[0].shape[1], *call.align.output_size)
    return call.features[0].new_empty(shape)


@torch.library.register_fake("tardkd::roi_align_backward", lib=_library)
def _(*packed):
    backward = AlignBackward.unpack(packed)
    return backward.grad_pooled.new_empty((flat_size(backward.layout.sizes),))


@torch.library.register_fake("tardkd::gaussian_feature_loss", lib=_library)
def _(*packed):
    call = GaussianCall.unpack(packed)
    loss = call.gt_boxes.new_empty((), dtype=accumulation_dtype(call.student_features[0].dtype))
    return loss, call.gt_boxes.new_empty((len(call.scales),), dtype=torch.float64)


@torch.library.register_fake("tardkd::gaussian_feature_loss_backward", lib=_library)
def _(*packed):
    call = GaussianBackward.unpack(packed).call
    return [gradient_like(feature, feature.dtype) for feature in call.student_features]


@torch.library.register_fake("tardkd::distribution_distill_loss", lib=_library)
def _(*packed):
    return distribution_results(DistributionCall(*packed))


@torch.library.register_fake("tardkd::distribution_distill_loss_backward", lib=_library)
def _(*packed):
    student = DistributionBackward.unpack(packed).call.student_distributions
    return student.new_empty(student.shape)
