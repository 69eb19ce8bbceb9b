"""A detector made ready for formats that know neither tardkd's ops nor Python."""

from __future__ import annotations

import copy
from typing import Any, Optional

from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection.transform import GeneralizedRCNNTransform


def deployable_copy(model: nn.Module) -> Any:
    """A copy of one of torchvision's detectors in eval mode that resizes the same wherever it runs."""
    model = copy.deepcopy(model)
    before: Any = model.transform
    model.transform = PlainTransform(
        before.min_size,
        before.max_size,
        before.image_mean,
        before.image_std,
        before.size_divisible,
        before.fixed_size,
    )
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
        if self.fixed_size is not None:
            size = [self.fixed_size[1], self.fixed_size[0]]
        else:
            height, width = int(image.shape[-2]), int(image.shape[-1])  # in a trace they are tensors of less precision
            scale = min(self.min_size[-1] / min(height, width), self.max_size / max(height, width))
            size = [int(height * scale), int(width * scale)]
        return functional.interpolate(image[None], size, mode="bilinear", align_corners=False)[0], target
