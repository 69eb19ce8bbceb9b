"""D-FINE: an RT-DETR whose boxes are means of distributions, one for each side."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tardkd.detectors.base import HeadSettings, Sides

from .rt_detr import RTDetrDetector


class DFineDetector(RTDetrDetector):
    """Each layer of the decoder moves the sides of the box that the first one has drawn around a query's object.

    Each of the bins stands for a move, in shares of that box, so that two models whose first boxes differ have their
    bins in other places.
    """

    @property
    def head(self) -> HeadSettings:
        return replace(super().head, bins=self.config.max_num_bins + 1)

    def sides(self, output: Any, height: float, width: float) -> Sides:
        first = self.first_query(output)
        logits = output.intermediate_predicted_corners[:, -1, first:].flatten(0, 1).unflatten(1, (4, -1))
        drawn = output.initial_reference_points[:, -1, first:].flatten(0, 1).detach().float()  # centre and size, shares
        centre, size = (drawn * drawn.new_tensor([width, height]).repeat(2)).split(2, dim=1)
        moves, scale = self._moves()
        outwards = torch.cat([-centre, centre], dim=1)
        return Sides(logits, outwards[:, :, None] + (size / scale).repeat(1, 2)[:, :, None] * (scale / 2 + moves))

    def _moves(self) -> tuple[Tensor, Tensor]:
        """(bins,) how far each bin moves a side, and the number (1,) of such units that a box has."""
        from transformers.models.d_fine.modeling_d_fine import weighting_function

        decoder = self.model.model.decoder
        scale = decoder.reg_scale.detach().float().abs()
        return weighting_function(decoder.max_num_bins, decoder.up.detach().float(), scale), scale
