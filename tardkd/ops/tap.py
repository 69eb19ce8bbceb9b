"""The place in a training step's graph where the feature term's gradient joins the others, without a pass of its own.

Two gradients meet at the student's features: that of the detector's own losses, and that of the feature term. Left to
autograd, the term's would be a pyramid of its own, filled with zeros, written and then added to the other one. But few
regions are compared, and they touch few pixels: it is enough to add these to the pyramid that is there already.

So a node of the graph, the tap, stands between the backbone and everybody who reads its features. Backwards it comes
after all of them, and receives the sum of what they have to say. There is one difficulty: the loss is made after the
features have been handed out, since the detector makes the regions from them. So the tap also hands out a scalar for
each loss that is to come, an input of that loss like any other, though its value is never read. What the loss's
backward pass returns as its "gradient" is the factor of the feature term. That makes autograd run the loss before the
tap in every backward pass, whatever is asked for, and hands the factor of this very pass over; where the loss has no
part in a pass, there is none, and the tap lets all gradients through as they are. All else that the term is made of
does not change from pass to pass: the loss leaves it at the tap when it is made, without its history, so that the graph
does not hold itself alive.

What arrives at the tap may belong to somebody else, too: it may be an expanded scalar, the same tensor as goes to
another branch, or kept by a hook or by who asked for it. The tap writes to it only where nobody else can see that:
where tensor and storage have no more holders than the factor has, a tensor that was made for this pass alone and came
the same way. (Autograd itself goes by such counts before it adds in place.) Everything else is copied first: 16-bit
gradients, too, which are added to in float32 and rounded once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import checks
from .fallback import has_kernels
from .gradients import graph_is_kept, once_differentiable
from .inputs import RegionCall, Wants
from .memory import empty_like
from .results import gradient_like
from .spec import integer


@dataclass(frozen=True, eq=False)
class FeatureTap:
    """What :func:`tap_features` returns."""

    features: list[Tensor]  # L x (N, C_l, H_l, W_l), the student's features, for all that reads them but the losses
    given: list[Tensor]  # L x (N, C_l, H_l, W_l), the same as they were given: for the losses
    _slots: list[_Slot] = field(default_factory=list)  # for the losses; none where nothing is to be added here
    _versions: list[int] = field(default_factory=list)  # of the features when they were handed out

    def holds(self, features: Sequence[Tensor]) -> bool:
        """Whether all of ``features``, L x (N, C_l, H_l, W_l), are among those given, each once, and unchanged."""
        places = [self._place(feature) for feature in features]
        return None not in places and len({*places}) == len(places)

    def check(self, student_features: Sequence[Tensor]) -> None:
        """Refuse features, L x (N, C_l, H_l, W_l), whose gradient would not pass here.

        Raises:
            ValueError: one of them was not given to the tap, or was changed since.
        """
        for level, feature in enumerate(student_features):
            if all(feature is not given for given in self.given):
                raise ValueError(
                    f"student_features[{level}] is none of the features that were given to tap_features: the loss "
                    "takes what the tap was given, not what it handed out"
                )
            if self._place(feature) is None:
                raise ValueError(f"student_features[{level}] was changed in place after tap_features")

    def original(self, feature: Tensor) -> Tensor:
        """What was given for one of the ``features``; any other, or one that was changed in place, as it is."""
        for given, handed in zip(self.given, self.features):
            if feature is handed and self._place(given) is not None:
                return given
        return feature

    def take(self, call: RegionCall) -> Tensor | None:
        """The scalar () that a loss takes in to add its features' gradient here; None: it has to do so by itself."""
        serves = call.loss.reduction != "none" and call.loss.feature_norm == "none"
        if not (self._slots and serves and self.holds(call.student_features)):
            return None
        slot = next((slot for slot in self._slots if slot.scalar is not None), None)
        if slot is None:
            raise ValueError(f"the tap is for {len(self._slots)} losses: tap_features(features, losses=...)")
        places = [self._place(feature) for feature in call.student_features]
        return slot.fill(call, [place for place in places if place is not None])

    def _place(self, feature: Tensor) -> int | None:
        for place, given in enumerate(self.given):
            if feature is given and (not self._versions or feature._version == self._versions[place]):
                return place
        return None


class _Term:
    """What one loss leaves at the tap: nothing before it is made, and after its gradient was for the last time."""

    def __init__(self) -> None:
        self.places: list[int] = []  # of the loss's features, among those given to the tap
        self._call: RegionCall | None = None
        self.saved_tensors: tuple[Tensor, ...] = ()  # as of the context of an autograd function

    def keep(self, call: RegionCall, places: list[int]) -> None:
        tensors = [None if tensor is None else tensor.detach() for tensor in call.tensors()]
        self._call, self.places = call.unreduced().with_tensors(tensors), places

    def drop(self) -> None:
        self._call, self.places = None, []

    @property
    def features(self) -> list[Tensor]:
        return [] if self._call is None else self._call.student_features

    def add_to(self, maps: list[Tensor], factor: Tensor) -> None:
        """Add the term's gradient, times the ``factor`` (), to maps L x (N, C_l, H_l, W_l)."""
        if self._call is not None:
            per_region = factor.expand(3, self._call.inputs.proposals.shape[0])  # of which the features' row is read
            torch.ops.tardkd.region_distill_add(maps, *self._call.pack(Wants(True, False, False), per_region))


class _Slot:
    """A place for one loss. The graph holds its term, but not its scalar, which holds the graph."""

    def __init__(self, scalar: Tensor, term: _Term) -> None:
        self.scalar: Tensor | None = scalar  # None: a loss has taken it
        self._term = term

    def fill(self, call: RegionCall, places: list[int]) -> Tensor | None:
        self._term.keep(call, places)
        scalar, self.scalar = self.scalar, None
        return scalar


def tap_features(features: Sequence[Tensor], *, losses: int = 1) -> FeatureTap:
    """Hand out the student's features so that a loss can add its gradient to the one that they get from others.

    It saves two passes over the pyramid's gradient, and the memory of one pyramid. The detector goes on with what the
    tap hands out, the loss is given the features themselves, and the tap:

    >>> tap = ops.tap_features(features)
    >>> proposals, detector_losses = heads(tap.features)
    >>> losses = ops.region_distill_loss(features, teacher_features, proposals, ..., tap=tap)

    Losses and gradients are the same as without it. It is a matter of speed alone: where it cannot serve, as with
    ``reduction="none"``, ``feature_norm="channel"``, under ``torch.compile`` or without kernels, gradients are added by
    autograd, as ever.

    Args:
        features: L tensors (N, C_l, H_l, W_l), float16, bfloat16, float32 or float64.
        losses: how many losses may add at this tap.

    Returns:
        :class:`FeatureTap`: ``features``, views of the given ones without a copy. Gradients with respect to them, by
        :func:`torch.autograd.grad` or a hook, are those of the other losses alone; those with respect to the given ones
        are complete.

    Raises:
        ValueError, TypeError: that is no list of feature maps.
    """
    if not isinstance(features, (list, tuple)):
        raise TypeError(f"features must be a list of tensors, one per level, got {type(features).__name__}")
    for level, feature in enumerate(features):
        checks.check_tensor(f"features[{level}]", feature, ("N", "C", "H", "W"), checks.FEATURE_DTYPES)
    integer("losses", losses, low=1)
    given = list(features)
    tapped = [place for place, feature in enumerate(given) if feature.requires_grad]
    if not (tapped and torch.is_grad_enabled() and all(map(_is_plain, given)) and has_kernels(given[0].device)):
        return FeatureTap(given, given)
    terms = [_Term() for _ in range(losses)]
    results = _Tap.apply(terms, tapped, *(given[place] for place in tapped))
    handed = list(given)
    for place, feature in zip(tapped, results[losses:]):
        handed[place] = feature
    slots = [_Slot(scalar, term) for scalar, term in zip(results, terms)]
    return FeatureTap(handed, given, slots, [feature._version for feature in given])


def _is_plain(feature: Tensor) -> bool:
    """Whether it has memory of its own, and no transform or compiler looks at it."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return type(feature) is Tensor and feature.device.type != "meta" and forward_ad._current_level < 0


class _Tap(torch.autograd.Function):
    """Hands out a scalar () for each term, and aliases of the features that stand at the places ``tapped``."""

    @staticmethod
    def forward(ctx: Any, terms: list[_Term], tapped: list[int], *features: Tensor) -> tuple[Tensor, ...]:
        ctx.terms, ctx.tapped, ctx.dtype = terms, tapped, features[0].dtype
        ctx.set_materialize_grads(False)
        scalars = [features[0].new_empty((), dtype=checks.accumulation_dtype(ctx.dtype)) for _ in terms]
        return *scalars, *(feature.detach() for feature in features)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        holders = [_count_holders(gradient) for gradient in upstream]  # first of all: a list would be a holder more
        terms = [(term, factor) for term, factor in zip(ctx.terms, upstream) if factor is not None]
        given = upstream[len(ctx.terms) :]
        if terms:
            sums = dict(zip(ctx.tapped, given))
            if torch.is_grad_enabled() or torch.compiler.is_compiling():  # enabled with create_graph=True
                _add_out_of_place(terms, sums)
            else:
                fewest = next(filter(None, holders), ())  # a factor's, which nobody else holds
                own = {
                    place
                    for place, held in zip(ctx.tapped, holders[len(ctx.terms) :])
                    if held and all(count <= few for count, few in zip(held, fewest))
                }
                _add_in_place(terms, sums, own)
            given = tuple(None if (total := sums[place]) is None else total.to(ctx.dtype) for place in ctx.tapped)
        return None, None, *given


def _add_in_place(terms: list[tuple[_Term, Tensor]], sums: dict[int, Tensor | None], own: set[int]) -> None:
    """Add every term, times its factor (), to the gradients (N, C_l, H_l, W_l) of the places, of which we ``own`` some.

    The sums are of the accumulation dtype where a term was added.
    """
    for term, factor in terms:
        maps = []
        for place, feature in zip(term.places, term.features):
            total, dtype = sums.get(place), checks.accumulation_dtype(feature.dtype)
            if total is None:
                total = _empty_map(feature, dtype).zero_()
            elif not (place in own and total.dtype == dtype and _is_dense(total)):
                total = _empty_map(feature, dtype).copy_(total)
            sums[place] = total
            own.add(place)
            maps.append(total)
        term.add_to(maps, factor)
        if not graph_is_kept():
            term.drop()


def _add_out_of_place(terms: list[tuple[_Term, Tensor]], sums: dict[int, Tensor | None]) -> None:
    """The same where what is added to must not change, and a second derivative of what is added be refused."""
    for term, factor in terms:
        for place, gradient in zip(term.places, _gradient_of(term, factor)):
            total = sums.get(place)
            sums[place] = gradient if total is None else total + gradient


@once_differentiable
def _gradient_of(term: _Term, factor: Tensor) -> tuple[Tensor, ...]:
    """The term's gradient alone, L x (N, C_l, H_l, W_l)."""
    maps = [_empty_map(feature, checks.accumulation_dtype(feature.dtype)).zero_() for feature in term.features]
    term.add_to(maps, factor)
    return tuple(map_.to(feature.dtype) for map_, feature in zip(maps, term.features))


def _empty_map(feature: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, C, H, W), dense, in the feature's memory format."""
    return (empty_like if feature.device.type == "cpu" else gradient_like)(feature, dtype)


def _is_dense(gradient: Tensor) -> bool:
    """Whether it is a tensor of torch's own with all elements, (N, C, H, W), one after the other."""
    if type(gradient) is not Tensor or gradient.layout != torch.strided:
        return False
    return gradient.is_contiguous() or gradient.is_contiguous(memory_format=torch.channels_last)


# Absent from a future torch: then nothing is known to be ours alone.
_storage_holders = getattr(torch._C, "_storage_Use_Count", None)


def _count_holders(tensor: Tensor | None) -> tuple[int, ...]:
    """How many hold this tensor in Python, in C++, and its memory. Empty: nobody knows."""
    if tensor is None or _storage_holders is None or not hasattr(tensor, "_use_count"):
        return ()
    if tensor.layout != torch.strided:
        return ()
    return sys.getrefcount(tensor), tensor._use_count(), _storage_holders(tensor.untyped_storage()._cdata)
