"""A detector made ready for formats that know neither tardkd's ops nor Python."""

from __future__ import annotations

import copy
from typing import Optional

from torch import Tensor
from torch.nn import functional
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign


def deployable(student: GeneralizedRCNN) -> GeneralizedRCNN:
    """A copy of the student that needs no op of tardkd, so that it can be converted to other formats."""
    model = copy.deepcopy(student)
    pool = model.roi_heads.box_roi_pool
    model.roi_heads.box_roi_pool = MultiScaleRoIAlign(
        pool.featmap_names,
        pool.output_size,
        pool.sampling_ratio,
        canonical_scale=pool.canonical_scale,
        canonical_level=pool.canonical_level,
    )
    before = model.transform
    model.transform = PlainTransform(before.min_size, before.max_size, before.image_mean, before.image_std)
    return model.eval()


class PlainTransform(GeneralizedRCNNTransform):
    """torchvision's transform, which resizes in TorchScript and in a trace as it does in plain Python.

    torchvision's own computes the scale in single precision there, and half of all sizes come out one pixel off.
    """

    def resize(
        self,
        image: Tensor,
        target: Optional[dict[str, Tensor]] = None,  # noqa: UP045, what TorchScript reads
    ) -> tuple[Tensor, Optional[dict[str, Tensor]]]:  # noqa: UP045
        height, width = int(image.shape[-2]), int(image.shape[-1])  # in a trace they are tensors in single precision
        scale = min(self.min_size[-1] / min(height, width), self.max_size / max(height, width))
        size = [int(height * scale), int(width * scale)]
        return functional.interpolate(image[None], size, mode="bilinear", align_corners=False)[0], target
