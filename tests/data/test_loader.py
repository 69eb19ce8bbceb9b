from __future__ import annotations

import multiprocessing
import subprocess
import sys
import time
from itertools import chain

import pytest
import torch
from torch.utils.data import Dataset, _utils

from tardkd.data import Scenes, build_loader, build_transform, to_float
from tardkd.data.loader import aspect_groups, epoch_batches


class Numbers(Dataset):
    """Images that are known by their number alone."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple:
        return torch.zeros(3, 4, 4), {"image_id": index}


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return Scenes(7, 64, 0, build_transform(scale=(0.7, 1.4), photometric=True))


def epoch_of(dataset, **settings) -> list:
    return list(build_loader(dataset, **{"batch_size": 2, "shuffle": True, "seed": 0, "epoch": 0, **settings}))


def ids(batches) -> list[list[int]]:
    return [[target["image_id"] for target in targets] for _, targets in batches]


def same(batches, others) -> bool:
    return len(batches) == len(others) and all(
        all(torch.equal(a, b) for a, b in zip(images, images2, strict=True))
        and all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(targets, targets2, strict=True))
        for (images, targets), (images2, targets2) in zip(batches, others, strict=True)
    )


def test_batches(scenes):
    images, targets = epoch_of(scenes)[0]
    assert len(images) == len(targets) == 2
    assert images[0].shape == (3, 64, 64) and images[0].dtype == torch.uint8
    (first, *_) = to_float(images)
    assert first.dtype == torch.float32 and torch.equal(first, images[0].float() / 255)
    assert first.min() >= 0 and first.max() <= 1 and first.max() > 0.2


def test_grouping_keeps_batches_of_one_shape():
    """And loses no image and no step by it."""
    groups = [int(index % 3 == 0) for index in range(50)]
    for epoch in range(3):
        plain, grouped = epoch_batches(50, 4, 7, epoch), epoch_batches(50, 4, 7, epoch, groups)
        assert len(plain) == len(grouped) == 12
        kinds = [{groups[index] for index in batch} for batch in grouped]
        assert sum(len(kind) == 2 for kind in kinds) <= 1 < sum(kind == {1} for kind in kinds)
        assert len({index for batch in grouped for index in batch}) == 48
        assert all(len(batch) == 4 for batch in grouped)
    first, again, other = (epoch_batches(50, 4, 7, epoch, groups) for epoch in (0, 0, 1))
    assert first == again != other
    assert epoch_batches(9, 4, 0, 0, [1] * 9) == epoch_batches(9, 4, 0, 0)  # of one group nothing changes


def test_wide_images_are_a_group():
    assert aspect_groups([(3, 4), (4, 3), (4, 4)]) == [1, 0, 0]


def test_order(scenes):
    assert ids(epoch_of(scenes, shuffle=False)) == [[1, 2], [3, 4], [5, 6], [7]]
    shuffled = ids(epoch_of(scenes))
    assert [len(batch) for batch in shuffled] == [2, 2, 2] and len(set(chain(*shuffled))) == 6
    assert ids(epoch_of(scenes)) == shuffled
    assert ids(epoch_of(scenes, epoch=1)) != shuffled and ids(epoch_of(scenes, seed=1)) != shuffled
    assert len(list(chain(*ids(epoch_of(scenes, batch_size=10))))) == 7  # the only batch stays


def test_views_depend_on_seed_epoch_and_image_alone(scenes):
    first = epoch_of(scenes)
    torch.manual_seed(123)
    assert same(first, epoch_of(scenes))
    assert same(first, epoch_of(scenes, workers=2))
    by_id = {
        target["image_id"]: image for images, targets in first for image, target in zip(images, targets, strict=True)
    }
    in_order = epoch_of(scenes, shuffle=False, batch_size=3)
    for images, targets in in_order:
        for image, target in zip(images, targets, strict=True):
            assert torch.equal(by_id.get(target["image_id"], image), image)
    other_epoch = epoch_of(scenes, shuffle=False, batch_size=3, epoch=1)
    assert not any(
        torch.equal(a, b)
        for (images, _), (images2, _) in zip(in_order, other_epoch, strict=True)
        for a, b in zip(images, images2, strict=True)
    )


def test_resume_within_an_epoch(scenes):
    assert same(epoch_of(scenes)[1:], epoch_of(scenes, first_batch=1))


def test_global_generator_is_left_alone(scenes):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    epoch_of(scenes)
    assert torch.equal(torch.rand(3), expected)


def test_float_images_stay(scenes):
    class Floats(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return torch.full((3, 4, 4), 0.5), {"image_id": 1}

    assert epoch_of(Floats())[0][0][0].unique().item() == 0.5


def test_errors(scenes):
    with pytest.raises(ValueError, match="batch_size"):
        epoch_of(scenes, batch_size=0)
    with pytest.raises(ValueError, match="no images"):
        epoch_of([])


@pytest.mark.parametrize("processes, parts", [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)])
def test_shares_of_processes_make_up_the_batches(processes, parts):
    def batches(**share):
        loader = build_loader(Numbers(26), batch_size=8, shuffle=True, seed=3, epoch=1, **share)
        return [[target["image_id"] for target in targets] for _, targets in loader]

    whole = batches()
    shares = [batches(processes=processes, rank=rank, parts=parts) for rank in range(processes)]
    for step, batch in enumerate(whole):
        together = [image for share in shares for part in share[parts * step : parts * (step + 1)] for image in part]
        assert together == batch
    assert {len(share) for share in shares} == {parts * len(whole)}


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_in_order_every_image_comes_once(processes):
    shares = [
        build_loader(Numbers(7), batch_size=6, shuffle=False, seed=0, epoch=0, processes=processes, rank=rank)
        for rank in range(processes)
    ]
    seen = [target["image_id"] for share in shares for _, targets in share for target in targets]
    assert sorted(seen) == list(range(7))


def test_a_batch_that_does_not_divide():
    with pytest.raises(ValueError, match="a batch of 3 images does not divide into 2 processes"):
        build_loader(Numbers(3), batch_size=4, shuffle=True, seed=0, epoch=0, processes=2)


def test_workers_end_with_a_run_that_an_error_ends():
    """Its traceback holds the batches until Python has ended, which waits for all processes that it has started."""
    program = """
import torch
from tardkd.data import build_loader
items = [(torch.zeros(3, 4, 4), {})] * 9
batches = iter(build_loader(items, batch_size=1, shuffle=False, seed=0, epoch=0, workers=1))
next(batches)
raise RuntimeError("out of memory")
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1
    assert ended.stderr.count("Error") == 1 and ended.stderr.endswith("RuntimeError: out of memory\n"), ended.stderr


def test_a_worker_that_is_stuck_is_killed(monkeypatch):
    """As where a file system does not answer."""

    class Stuck(Numbers):
        def __getitem__(self, index):
            time.sleep(1000 * index)
            return super().__getitem__(index)

    monkeypatch.setattr(_utils, "MP_STATUS_CHECK_INTERVAL", 0.1)  # seconds that torch waits for a worker
    others = multiprocessing.active_children()
    batches = iter(build_loader(Stuck(9), batch_size=1, shuffle=False, seed=0, epoch=0, workers=1))
    next(batches)
    [worker] = set(multiprocessing.active_children()) - set(others)
    try:
        batches.close()
        worker.join(60)
        assert not worker.is_alive()
    finally:
        worker.kill()
