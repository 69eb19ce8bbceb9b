"""distribution_distill_loss against the reference in float64."""

from __future__ import annotations

import math

import pytest
import torch
from tolerances import assert_tensors_close, assert_values_close
from torch.autograd import gradcheck

from tardkd.ops import reference

from .parity import upstream_sum
from .test_edges import NAN
from .test_region_loss import DTYPES

LAYOUTS = {
    "dense": lambda x: x.contiguous(),
    "bins first": lambda x: x.permute(2, 1, 0).contiguous().permute(2, 1, 0),  # as a dense head's columns are
    "sliced": lambda x: torch.cat([x + 99, x, x + 99], 2)[..., x.shape[2] : 2 * x.shape[2]],
    "every other": lambda x: x.repeat_interleave(2, 0)[::2],
}


def make_inputs(seed=0, regions=40, bins=16, student=torch.float32, teacher=None, layout="dense", device="cpu"):
    """Student's and teacher's logits, of which the first require grad, and the gates."""
    generator = torch.Generator().manual_seed(seed)
    sides = 2 * torch.randn(2, regions, 4, bins, generator=generator, dtype=torch.float64)
    gates = torch.stack([torch.rand(regions, generator=generator) < 0.6] * 3, 1)[:, 2]  # as a column of RegionLosses'
    first = LAYOUTS[layout](sides[0].to(device, student)).requires_grad_()
    return first, LAYOUTS[layout](sides[1].to(device, teacher or student)), gates.to(device)


def make_weights(regions, device="cpu"):
    return torch.linspace(-1, 3, regions, device=device)


def assert_matches(ops, student, teacher, gates, **options):
    """Loss and gradient against the reference's in float64."""
    wide = student.detach().double().requires_grad_()
    loss = ops.distribution_distill_loss(student, teacher, gates, **options)
    expected = reference.distribution_distill_loss(wide, teacher.double(), gates, **options)
    assert loss.dtype == (torch.float64 if student.dtype == torch.float64 else torch.float32)
    assert loss.shape == expected.shape
    assert_values_close(loss, expected, student.dtype, "distribution loss")
    (gradient,) = torch.autograd.grad(1.7 * upstream_sum(loss), student)
    (target,) = torch.autograd.grad(1.7 * upstream_sum(expected), wide)
    assert target.any() or not gates.any()
    assert_tensors_close(gradient, target, student.dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_dtypes_and_layouts(backend, dtypes, layout):
    student, teacher = DTYPES[dtypes]
    assert_matches(backend.ops, *make_inputs(1, 40, 16, student, teacher, layout, backend.device))


@pytest.mark.parametrize("bins", [1, 2, 17, 33, 100, 300])
@pytest.mark.parametrize("regions", [1, 3, 130])
def test_sizes(kernel, regions, bins):
    student, teacher, gates = make_inputs(2, regions, bins, device=kernel.device)
    gates[0] = True
    if bins == 1:  # there is nothing to say
        loss = kernel.ops.distribution_distill_loss(student, teacher, gates)
        assert loss == 0 and not torch.autograd.grad(loss, student)[0].any()
    else:
        assert_matches(kernel.ops, student, teacher, gates)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_more_regions_than_threads_add_them_up(kernel, reduction):
    """The last block has 256 threads; 1300 regions are several turns for each, and not the same number for all."""
    assert_matches(kernel.ops, *make_inputs(13, 1300, 2, device=kernel.device), reduction=reduction)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 10.0])
def test_options(kernel, temperature, reduction, weighted):
    inputs = make_inputs(3, device=kernel.device)
    options = dict(temperature=temperature, reduction=reduction)
    if weighted:
        options["region_weights"] = make_weights(40, kernel.device)
    assert_matches(kernel.ops, *inputs, **options)


@pytest.mark.parametrize("temperature", [30.0, 1000.0])
def test_high_temperatures(backend, temperature):
    if backend.name.startswith("cuda"):
        pytest.skip("the CUDA kernels take the plain form, which rounds: see the docstring")
    assert_matches(backend.ops, *make_inputs(4, device=backend.device), temperature=temperature)


def test_by_hand(backend):
    """Two regions, of which the second is closed; the first differs in one side of four."""
    student = torch.zeros(2, 4, 2, dtype=torch.float64, device=backend.device, requires_grad=True)
    teacher = student.detach().clone()
    teacher[0, 2, 0] = 2 * math.log(3.0)  # at T = 2: 3/4 and 1/4
    teacher[1] = torch.randn(4, 2)
    gates = torch.tensor([True, False], device=backend.device)
    loss = backend.ops.distribution_distill_loss(student, teacher, gates, temperature=2.0)
    assert loss.item() == pytest.approx(4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 4, rel=1e-13)
    (gradient,) = torch.autograd.grad(loss, student)
    expected = torch.zeros_like(gradient)
    expected[0, 2] = torch.tensor([-0.25, 0.25]) * 2 / 4
    torch.testing.assert_close(gradient, expected, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("nothing", ["no regions", "all closed"])
def test_nothing_to_distil(backend, nothing, reduction):
    student, teacher, gates = make_inputs(5, 0 if nothing == "no regions" else 9, device=backend.device)
    gates[:] = False
    loss = backend.ops.distribution_distill_loss(student, teacher, gates, reduction=reduction)
    assert loss.requires_grad and not loss.detach().any()
    assert loss.shape == (gates.shape if reduction == "none" else ())
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert gradient.shape == student.shape and not gradient.any()


def test_closed_regions_are_not_looked_at(backend):
    student, teacher, gates = make_inputs(6, device=backend.device)
    weights = make_weights(40, backend.device)
    expected = backend.ops.distribution_distill_loss(student, teacher, gates, region_weights=weights)
    for tensor in (student.data, teacher, weights):
        tensor[~gates] = NAN
    loss = backend.ops.distribution_distill_loss(student, teacher, gates, region_weights=weights)
    assert torch.equal(loss, expected)
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.isfinite().all() and not gradient[~gates].any() and gradient[gates].any()


def test_bins_without_mass(backend):
    """Where the teacher gives none, -inf is no NaN."""
    student, teacher, gates = make_inputs(7, device=backend.device)
    teacher[:, :, 3] = -math.inf
    assert_matches(backend.ops, student, teacher, gates)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_derivatives(backend, reduction):
    student, teacher, gates = make_inputs(8, 5, 4, torch.float64, device=backend.device)

    def function(leaf):
        return backend.ops.distribution_distill_loss(leaf, teacher, gates, reduction=reduction, temperature=2.0)

    assert gradcheck(function, student)


def test_a_second_derivative_is_refused(kernel):
    student, teacher, gates = make_inputs(9, device=kernel.device)
    loss = kernel.ops.distribution_distill_loss(student, teacher, gates)
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot differentiate twice"):
        gradient.sum().backward()


def test_the_graph_may_be_walked_twice(backend):
    student, teacher, gates = make_inputs(10, device=backend.device)
    loss = backend.ops.distribution_distill_loss(student, teacher, gates)
    (first,) = torch.autograd.grad(loss, student, retain_graph=True)
    assert torch.equal(torch.autograd.grad(loss, student)[0], first)


def test_any_number_of_threads_gives_the_same_bits(cpu):
    student, teacher, gates = make_inputs(11, 300)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        loss = cpu.ops.distribution_distill_loss(student, teacher, gates)
        results.append((loss, *torch.autograd.grad(loss, student)))
    torch.set_num_threads(1)
    assert all(torch.equal(*pair) for other in results[1:] for pair in zip(other, results[0]))


def test_misfits(backend):
    student, teacher, gates = make_inputs(12, device=backend.device)
    weights = make_weights(40, backend.device)
    fitting = dict(student_distributions=student, teacher_distributions=teacher, gates=gates, region_weights=weights)
    for changed, error, message in (
        (
            dict(student_distributions=student.detach().flatten(1)),
            ValueError,
            r"student_dis.* \(R, 4, bins\), got \(40",
        ),
        (dict(student_distributions=student.detach()[:, :3]), ValueError, r"student_dis.* \(R, 4, bins\), got \(40, 3"),
        (
            dict(teacher_distributions=teacher[..., :9]),
            ValueError,
            r"student_dis.*40, 4, 16\) but teacher_.*40, 4, 9\)",
        ),
        (dict(teacher_distributions=teacher.double()), TypeError, r"teacher_dis.* is torch.float64 but student_dis"),
        (dict(teacher_distributions=teacher.int()), TypeError, r"teacher_dis.* must be one of .*torch.int32"),
        (dict(teacher_distributions=teacher.to("meta")), ValueError, r"teacher_dis.* is on meta but student_dis"),
        (dict(teacher_distributions=teacher.clone().requires_grad_()), ValueError, r"teacher_dis.* grad.*detach"),
        (dict(gates=gates[:5]), ValueError, r"gates has 5 rows but student_distributions has 40"),
        (dict(gates=gates.float()), TypeError, r"gates must be one of torch.bool; got torch.float32"),
        (dict(gates=gates[:, None]), ValueError, r"gates must have shape \(R\), got \(40, 1\)"),
        (dict(gates=gates.to("meta")), ValueError, r"gates is on meta but student_distributions is on (cpu|cuda)"),
        (dict(region_weights=weights[:5]), ValueError, r"region_weights has 5 rows"),
        (dict(region_weights=weights.clone().requires_grad_()), ValueError, r"region_weights requires grad"),
        (dict(temperature=0.0), ValueError, r"temperature must be positive, got 0"),
        (dict(reduction="average"), ValueError, r"reduction must be one of mean, sum, none"),
    ):
        with pytest.raises(error, match=message):
            backend.ops.distribution_distill_loss(**{**fitting, **changed})
