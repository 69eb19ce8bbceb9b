"""The choice of regions depends on the image's seed alone."""

from __future__ import annotations

import torch

from tardkd.detectors import for_model
from tardkd.detectors.sampling import SeededSampler, fewer_regions, region_count, seed_samplers

from .tiny import tiny_batch, tiny_detector


class Draw:
    """A sampler that draws whatever comes next."""

    def __call__(self, matched):
        return [torch.randperm(len(of_image)) for of_image in matched], [torch.rand(3) for _ in matched]


def test_what_is_drawn_of_an_image_depends_on_its_seed_alone():
    images = [torch.zeros(50), torch.zeros(60)]
    sampler, before = SeededSampler(Draw()), torch.get_rng_state()
    sampler.seeds = [5, 6]
    both = sampler(images)
    sampler.seeds = [6]
    alone = sampler(images[1:])
    assert torch.equal(both[0][1], alone[0][0]) and torch.equal(both[1][1], alone[1][0])
    sampler.seeds = [7]
    assert not torch.equal(sampler(images[1:])[0][0], alone[0][0])
    assert torch.equal(torch.get_rng_state(), before)


def test_without_seeds_it_draws_as_torchvision_would():
    images = [torch.zeros(50)]
    torch.manual_seed(1)
    expected = Draw()(images)[0][0]
    torch.manual_seed(1)
    assert torch.equal(SeededSampler(Draw())(images)[0][0], expected)


def test_every_sampler_of_a_detector_is_seeded_once():
    model = tiny_detector()
    samplers = seed_samplers(model)
    assert samplers == [model.rpn.fg_bg_sampler, model.roi_heads.fg_bg_sampler]
    assert all(isinstance(sampler, SeededSampler) for sampler in samplers)
    assert seed_samplers(model) == samplers  # a second training step of the model shares them
    assert not any(isinstance(sampler.sampler, SeededSampler) for sampler in samplers)


def test_fewer_regions_for_a_while():
    model = tiny_detector()
    detector = for_model(model)
    seed_samplers(model)
    counted: list[int] = []
    model.roi_heads.box_head.register_forward_hook(lambda module, args, output: counted.append(len(output)))
    with fewer_regions(detector, 3):
        assert region_count(detector) == 3
        model(*tiny_batch())
    assert region_count(detector) == 16
    model(*tiny_batch())
    assert counted[0] <= 6 < counted[1]
