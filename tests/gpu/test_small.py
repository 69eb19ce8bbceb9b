"""Every op on small inputs against the CPU kernels: few launches of others, so that a sanitizer gets through them."""

from __future__ import annotations

import pytest
import torch
from ops.test_region_loss import DTYPES

from .cases import STEPS, assert_matches, make_case, run

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("name", STEPS)
def test_dtypes_and_layouts(name, dtypes, layout):
    case = make_case(201, *DTYPES[dtypes], layout)
    assert_matches(run(name, case), run(name, case.wide()), DTYPES[dtypes][0])


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "sliced"])
@pytest.mark.parametrize("channels", [1, 5, 70])
@pytest.mark.parametrize("geometry", ["equal", "strides"])
@pytest.mark.parametrize("name", ["region-all", "region-none", "align", "gaussian"])
def test_channels_and_geometries(name, geometry, channels, layout):
    case = make_case(202, layout=layout, channels=channels, geometry=geometry, regions=12)
    assert_matches(run(name, case), run(name, case.wide()), torch.float32)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_deterministic_mode(deterministic, name, dtype, layout):
    case = make_case(203, dtype, layout=layout)
    assert_matches(run(name, case), run(name, case.wide()), dtype)


@pytest.mark.parametrize("name", [name for name in STEPS if name != "gaussian"])
def test_no_regions(name):
    case = make_case(204, regions=4)
    case.scene = case.scene.rows(slice(0, 0))
    case.scene.student_logits, case.scene.student_deltas = (
        head.detach().requires_grad_() for head in (case.scene.student_logits, case.scene.student_deltas)
    )
    case.pooled = [case.pooled[0].detach()[:0].requires_grad_(), case.pooled[1][:0]]
    case.distributions = [case.distributions[0].detach()[:0].requires_grad_(), case.distributions[1][:0]]
    case.region_upstream = [upstream[:0] for upstream in case.region_upstream]
    case.pooled_upstream = case.pooled_upstream[:0]
    outcome = run(name, case)
    assert not any(result.any() for result in outcome.results)
    assert not any(gradient.any() for gradient in outcome.gradients)
