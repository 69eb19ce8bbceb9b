"""The gradients of a loss's terms times what autograd hands down, in one launch."""

from __future__ import annotations

import pytest
import torch

from tardkd.ops.autograd import scale_gradients

FACTORS = [0.5, 3.0, -0.25]


def scaled(gradients, dtypes, terms, dtype, in_place=False):
    """Results, and what they should be; the upstream gradients are 2, 3, ..."""
    factors = torch.tensor(FACTORS, dtype=dtype)
    upstream = [torch.tensor(2.0 + k, dtype=dtype) for k in range(len(terms))]
    expected = [
        (gradient * (given * (1 if term < 0 else factors[term]))).to(to)
        for gradient, given, term, to in zip(gradients, upstream, terms, dtypes)
    ]
    results = gradients if in_place else [torch.empty_like(g, dtype=to) for g, to in zip(gradients, dtypes)]
    scale_gradients(results, gradients, factors, upstream, terms)
    return results, expected


@pytest.mark.parametrize("sizes", [(1, 2, 3), (4096, 0, 5), (4095, 4097, 20000), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("to", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_several_gradients(host, to, sizes):
    dtype = torch.float64 if to == torch.float64 else torch.float32
    gradients = [torch.randn(size, dtype=dtype) for size in sizes]
    for result, expected in zip(*scaled(gradients, [to] * 3, [0, 1, 2], dtype)):
        assert result.dtype == to and torch.equal(result, expected)


@pytest.mark.parametrize("terms", [[], [1], [2, 0], [-1], [0, 2, -1]], ids=str)
def test_some_of_them_and_without_a_factor(host, terms):
    gradients = [torch.randn(3, 7) for _ in terms]
    for pair in zip(*scaled(gradients, [torch.float32] * len(terms), terms, torch.float32)):
        assert torch.equal(*pair)


@pytest.mark.parametrize("begin", [0, 1, 4])
def test_in_place_wherever_they_begin(host, begin):
    """Where they are aligned, four elements are read at a time."""
    all_of_it = torch.randn(10000)
    gradient = all_of_it[begin : begin + 9000]
    before, after = all_of_it[:begin].clone(), all_of_it[begin + 9000 :].clone()
    ([result], [expected]) = scaled([gradient], [torch.float32], [2], torch.float32, in_place=True)
    assert torch.equal(result, expected)
    assert torch.equal(all_of_it[:begin], before) and torch.equal(all_of_it[begin + 9000 :], after)
