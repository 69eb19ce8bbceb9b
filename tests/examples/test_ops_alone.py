from __future__ import annotations

import torch
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import MultiScaleRoIAlign


def test_the_loss_falls_and_class_gates_close(example, capsys):
    history = example("ops_alone").train(30)
    assert len(history) == 30 and history[-1] < 0.5 * history[0]
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    first, last = (int(lines[index][-2].rstrip("%")) for index in (0, -1))  # feature, classification, regression
    assert last < first


def test_steps_are_those_asked_for(example, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["ops_alone.py", "--steps", "2"])
    example("ops_alone").main()
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_the_pooling_is_torchvisions(example):
    """What the example says of its pooling: another import, the same result."""
    module = example("ops_alone")
    student, generator = module.Student(), torch.Generator().manual_seed(0)
    rival = MultiScaleRoIAlign(["fine", "coarse"], output_size=7, sampling_ratio=2, **module.LEVEL_RULE)
    maps = {
        name: torch.randn(module.IMAGES, module.CHANNELS, side, side, generator=generator)
        for name, side in (("fine", 32), ("coarse", 16))
    }
    proposals, _, _ = module.make_regions(generator)
    shapes = [(module.SIZE, module.SIZE)] * module.IMAGES
    torch.testing.assert_close(student.pool(maps, proposals, shapes), rival(maps, proposals, shapes))


def test_boxes_are_encoded_as_in_torchvision(example):
    module = example("ops_alone")
    proposals, _, objects = module.make_regions(torch.Generator().manual_seed(0))
    (expected,) = BoxCoder((10.0, 10.0, 5.0, 5.0)).encode([objects], [torch.cat(proposals)])
    torch.testing.assert_close(module.encode(objects, torch.cat(proposals)), expected, rtol=1e-4, atol=1e-4)
