"""What the registered ops need of a device's kernels. ``cpu.py`` and ``cuda.py`` each provide it."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from .inputs import RegionCall, RegionResults, Wants


class Kernels(Protocol):
    """One implementation of every registered op, under its name.

    The arguments of the losses over shared regions come as they are, those of the others as the calls in ``inputs.py``
    pack them.
    """

    def defers(self, call: RegionCall) -> bool:
        """Whether the gradients of a reduced loss are made in the backward pass, although they need not be."""

    def adds(self, call: RegionCall) -> bool:
        """Whether it pays to add the features' gradient to another: for that the open regions are pooled once more."""

    def leaves_pixels(self, call: RegionCall) -> bool:
        """Whether ``region_distill`` leaves the features' gradient pooled, for ``region_distill_backward``."""

    def region_distill(self, call: RegionCall, wants: Wants, upstream: Tensor | None) -> RegionResults:
        """From the pyramids; ``upstream`` (3, R): gradients of every region's terms, None: ones."""

    def region_distill_backward(self, *packed: Any) -> Tensor:
        """:class:`RegionBackward`; returns the gradient of the student's features, flat, in their dtype."""

    def region_distill_add(
        self, gradients: list[Tensor], call: RegionCall, wants: Wants, upstream: Tensor | None
    ) -> None:
        """The same without results: the features' gradient is added to ``gradients``, L x (N, C_l, H_l, W_l).

        These are dense, in the accumulation dtype. Without ``feature_norm``, through which a gradient goes as a whole.
        """

    def pooled_distill(self, call: RegionCall, wants: Wants, upstream: Tensor | None) -> RegionResults:
        """From features that are pooled already."""

    def head_distill(self, call: RegionCall, wants: Wants, upstream: Tensor | None) -> RegionResults:
        """Without features."""

    def scale_gradients(
        self, results: list[Tensor], gradients: list[Tensor], factors: Tensor, upstream: list[Tensor], terms: list[int]
    ) -> None:
        """Write to each of ``results`` its gradient times ``upstream`` () and the factor of its term.

        Args:
            results: of the gradients' shapes and any dtype; may be the gradients themselves.
            gradients: contiguous, in the accumulation dtype.
            factors: (3,) of :class:`RegionResults`.
            terms: which of them; -1: none.
        """

    def channel_norms(self, features: list[Tensor]) -> Tensor:
        """What standardises the channels of ``features``, as :class:`RegionInputs` has it for either side."""

    def roi_align(self, *packed: Any) -> Tensor:
        """:class:`AlignCall`; returns (R, C, p_h, p_w) in the features' dtype."""

    def roi_align_backward(self, *packed: Any) -> Tensor:
        """:class:`AlignBackward`; returns the maps' gradient, flat, in the dtype of ``grad_pooled``."""

    def gaussian_feature_loss(self, *packed: Any) -> tuple[Tensor, Tensor]:
        """:class:`GaussianCall`; returns the loss () and the sums of the levels' masks (L,) in float64."""

    def gaussian_feature_loss_backward(self, *packed: Any) -> list[Tensor]:
        """:class:`GaussianBackward`; returns the gradients of the student's features, L x (N, C, H_l, W_l)."""

    def distribution_distill_loss(self, *packed: Any) -> tuple[Tensor, Tensor]:
        """:class:`DistributionCall`; returns the loss, () or (R,), and the factor () of a reduced one's gradient."""

    def distribution_distill_loss_backward(self, *packed: Any) -> Tensor:
        """:class:`DistributionBackward`; returns the gradient of the student's distributions, (R, 4, bins)."""
