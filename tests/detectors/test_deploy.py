"""What a detector is made into for other formats."""

from __future__ import annotations

import pytest
import torch
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from tardkd.detectors.torchvision.deploy import PlainTransform


@pytest.mark.parametrize("size", [(200, 270), (300, 410), (51, 74), (100, 130)])
def test_images_are_resized_as_outside_of_torchscript_and_traces(size):
    arguments = [320], 640, [0.0] * 3, [1.0] * 3
    image = torch.rand(3, *size)
    expected = GeneralizedRCNNTransform(*arguments).eval()([image])[0]
    ours = PlainTransform(*arguments).eval()
    scripted = torch.jit.script(ours)([image])[0]
    assert scripted.image_sizes == expected.image_sizes
    traced = torch.jit.trace(lambda image: ours([image])[0].tensors, (image,))(image)
    for tensors in (scripted.tensors, traced):
        torch.testing.assert_close(tensors, expected.tensors)
