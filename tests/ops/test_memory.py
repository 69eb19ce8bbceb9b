"""Memory for large results, kept from one step to the next."""

import concurrent.futures
import gc
import subprocess
import sys

import pytest
import torch

from tardkd import ops
from tardkd.ops import memory

MEBIBYTE = 2**20


@pytest.fixture(autouse=True)
def nothing_kept():
    gc.collect()
    ops.empty_cache()
    yield
    gc.collect()
    ops.empty_cache()


def large(mebibytes: float) -> torch.Tensor:
    return memory.empty((int(mebibytes * MEBIBYTE / 4),), torch.float32)


def test_what_is_freed_is_used_again():
    first = large(10)
    address = first.data_ptr()
    other = large(10)
    assert other.data_ptr() != address  # while it is in use it belongs to one
    del first
    assert large(9).data_ptr() == address


def test_views_hold_it():
    flat = large(8)
    flat.fill_(3)
    view = flat[5:].view(-1)
    address = flat.data_ptr()
    del flat
    assert large(8).data_ptr() != address
    assert (view == 3).all()


def test_no_more_is_kept_than_was_in_use_at_once():
    for mebibytes in (4, 8, 16, 6, 30, 12, 20):
        large(mebibytes)
    assert ops.empty_cache() == 30 * MEBIBYTE
    assert ops.empty_cache() == 0
    both = large(20), large(10)
    del both
    large(4), large(14)
    assert ops.empty_cache() == 30 * MEBIBYTE


def test_a_smaller_peak_after_giving_back():
    large(40)
    assert ops.empty_cache() == 40 * MEBIBYTE
    large(6)
    assert ops.empty_cache() == 6 * MEBIBYTE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_and_formats(dtype):
    for shape in ((2, 64, 96, 96), (2, 3, 4, 5), (0, 8, 7, 7), (4, 0, 7, 7)):
        feature = torch.zeros(shape)
        like = memory.empty_like(feature, dtype)
        assert (like.shape, like.dtype, like.is_contiguous()) == (feature.shape, dtype, True)
        last = memory.empty_like(feature.to(memory_format=torch.channels_last), dtype)
        assert last.shape == feature.shape
        assert not feature.numel() or last.is_contiguous(memory_format=torch.channels_last)


def test_alignment_for_vectors():
    for mebibytes in (1, 2.5, 8):
        assert large(mebibytes).data_ptr() % 64 == 0


def test_gradients_of_one_step_are_not_overwritten_by_the_next():
    """They may be kept: added up over steps, or compared."""
    torch.manual_seed(0)
    features = [torch.randn(1, 32, 128, 128, requires_grad=True)]
    boxes = torch.tensor([[0, 4.0, 4.0, 100.0, 90.0], [0, 20.0, 30.0, 400.0, 380.0]])

    def gradient(scale: float) -> torch.Tensor:
        pooled = ops.multiscale_roi_align(features, boxes, scales=[0.25])
        return torch.autograd.grad((scale * pooled).sum(), features)[0]

    once = gradient(1.0)
    expected = once.clone()
    kept = [gradient(float(scale)) for scale in range(2, 6)]
    assert torch.equal(once, expected)
    for scale, one in zip(range(2, 6), kept):
        torch.testing.assert_close(one, scale * expected)


def test_kernels_do_not_rely_on_what_was_there():
    """A block comes back with what the last step left in it."""
    torch.manual_seed(0)
    features = [torch.randn(1, 32, 128, 128, requires_grad=True)]
    boxes = torch.tensor([[0, 4.0, 4.0, 100.0, 90.0]])

    def gradient() -> torch.Tensor:
        return torch.autograd.grad(ops.multiscale_roi_align(features, boxes, scales=[0.25]).sum(), features)[0]

    expected = gradient().clone()
    large(4).fill_(float("nan"))
    assert torch.equal(gradient(), expected)


def fill_and_check(value: int) -> torch.Tensor:
    for _ in range(200):
        one = large(2).fill_(value)
        assert (one == value).all()
    return one


def test_threads_share_it():
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        kept = list(pool.map(fill_and_check, range(16)))
    assert all((one == value).all() for value, one in enumerate(kept))


def test_a_process_may_end_with_tensors_alive(tmp_path):
    program = "from tardkd.ops import memory; import torch; kept = memory.empty((2**20,), torch.float32).fill_(1)"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert (ended.returncode, ended.stderr) == (0, "")
