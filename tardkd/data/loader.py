"""Batches whose order and views are pure functions of (seed, epoch), so that a resumed run goes on exactly."""

from __future__ import annotations

import atexit
import signal
import weakref
from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .coco import Target
from .seeds import mix


def build_loader(
    dataset: Dataset,
    *,
    batch_size: int,
    shuffle: bool,
    seed: int,
    epoch: int,
    workers: int = 0,
    first_batch: int = 0,
    processes: int = 1,
    rank: int = 0,
    parts: int = 1,
    pin_memory: bool = False,
    groups: Sequence[int] | None = None,
) -> DataLoader:
    """Batches ``(images, targets)`` of a data set.

    A batch has N images (3, H, W), uint8 in 0..255 or float in [0, 1] as the data set gives them (see
    :func:`to_float`), and N target dicts.

    The order depends on (seed, epoch) alone and the random view of image ``index`` on (seed, epoch, index) alone, so
    neither the number of workers nor what was drawn before matters, and torch's global generator is left as it was.
    With ``shuffle`` the batches are those of :func:`epoch_batches`; without, all images come, in order.

    Of several processes each takes its share of every batch, in ``parts`` that come one after the other; without
    ``shuffle`` every image comes in one of them. Together the shares are the batch that one process would have.

    Args:
        batch_size: images, of all processes and parts together.
        first_batch: how many batches (parts) of the epoch to leave out at its beginning, to resume within it.
        pin_memory: for copies to a GPU that need not be waited for.
        groups: a number for each image, see :func:`epoch_batches`; with ``shuffle`` only.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, found {batch_size}")
    count = len(dataset)  # type: ignore[arg-type]  # torch leaves the length to the classes derived from Dataset
    if count == 0:
        raise ValueError("the data set has no images")
    if shuffle:
        batches = [
            part
            for batch in epoch_batches(count, batch_size, seed, epoch, groups)
            for part in _share(batch, processes, rank, parts)
        ]
    else:
        batches = _chunks(list(range(rank, count, processes)), max(1, batch_size // (processes * parts)))
    return _Loader(
        _SeededItems(dataset, seed, epoch),
        batch_sampler=batches[first_batch:],
        collate_fn=_collate,
        num_workers=workers,
        pin_memory=pin_memory,
        generator=_generator(seed, epoch),
        worker_init_fn=_ignore_termination,
    )


def _share(batch: list[int], processes: int, rank: int, parts: int) -> list[list[int]]:
    size, rest = divmod(len(batch), processes * parts)
    if rest:
        into = f"{processes} processes times {parts} parts"
        raise ValueError(f"a batch of {len(batch)} images does not divide into {into}")
    first = rank * parts * size
    return [batch[first + part * size : first + (part + 1) * size] for part in range(parts)]


def epoch_batches(
    count: int, batch_size: int, seed: int, epoch: int, groups: Sequence[int] | None = None
) -> list[list[int]]:
    """The batches of an epoch, as lists of the indices 0..count - 1: a pure function of its arguments.

    With ``groups``, a number for every index, a batch holds images of one group, filled in the epoch's random order.
    What is left of the groups at the end makes mixed batches, so that grouping costs no image and no step. With or
    without, an incomplete last batch is dropped unless it is the only one.
    """
    batches: list[list[int]] = []
    waiting: dict[int, list[int]] = defaultdict(list)
    for index in torch.randperm(count, generator=_generator(seed, epoch)).tolist():
        group = 0 if groups is None else groups[index]
        waiting[group].append(index)
        if len(waiting[group]) == batch_size:
            batches.append(waiting.pop(group))
    batches += _chunks([index for group in waiting.values() for index in group], batch_size)
    if len(batches) > 1 and len(batches[-1]) < batch_size:
        batches.pop()
    return batches


def aspect_groups(sizes: Iterable[tuple[int, int]]) -> list[int]:
    """For images of (height, width): 1 for wide ones, 0 for the others. A batch of one kind needs less padding."""
    return [int(width > height) for height, width in sizes]


def _chunks(indices: list[int], size: int) -> list[list[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def _ignore_termination(worker: int) -> None:
    """A scheduler or Ctrl-C tells all processes of a job to end: the one that trains ends them when it has saved."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def collate(items: list[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """Images of differing sizes stay a list, and uint8, a quarter of the bytes to pass on."""
    return [image for image, _ in items], [target for _, target in items]


def to_float(images: Iterable[Tensor], device: torch.device | str = "cpu") -> list[Tensor]:
    """The images on ``device``, uint8 ones as float32 in [0, 1], on every device to the bit the same."""
    # Not by a number: a CUDA tensor is then multiplied by its reciprocal.
    whole = torch.full((), 255.0, dtype=torch.float32, device=device)
    on_device = [image.to(device, non_blocking=True) for image in images]
    return [image / whole if image.dtype == torch.uint8 else image for image in on_device]


class _Loader(DataLoader):
    """Raises the error of an image as it is, whichever process met it: torch would put a traceback into its message.

    However the loading ends, its workers end with it.
    """

    def __iter__(self) -> Iterator:  # type: ignore[override]  # torch names its own class there
        batches = self._batches()
        _loading.add(batches)
        return batches

    def _batches(self) -> Generator:
        batches: Any = super().__iter__()
        try:
            for batch in batches:
                if isinstance(batch, Exception):
                    raise batch
                yield batch
        finally:
            if self.num_workers:
                batches._shutdown_workers()
                for worker in batches._workers:
                    if worker.is_alive():  # it is stuck, and torch has told it to end by the signal that it ignores
                        worker.kill()


_loading: weakref.WeakSet[Generator] = weakref.WeakSet()  # what has begun and may not have ended


@atexit.register  # after torch and multiprocessing, to be called before them
def _end_loading() -> None:
    """Python ends by telling workers to, with the signal that they ignore, and would wait for them for ever.

    There are some left where the traceback of the error that Python ends with still holds the batches.
    """
    for batches in list(_loading):
        batches.close()


def _collate(items: list[tuple[Tensor, Target] | Exception]) -> tuple[list[Tensor], list[Target]] | Exception:
    """The batch, or the first error among its items."""
    good = []
    for item in items:
        if isinstance(item, Exception):
            return item
        good.append(item)
    return collate(good)


class _SeededItems(Dataset):
    """``dataset`` with torch's CPU generator seeded for each item and restored after it.

    In the place of an item that cannot be read is its error.
    """

    def __init__(self, dataset: Dataset, seed: int, epoch: int) -> None:
        self.dataset, self.seed, self.epoch = dataset, seed, epoch

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # as in build_loader

    def __getitem__(self, index: int) -> tuple[Tensor, Target] | Exception:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mix(self.seed, self.epoch, index))
            try:
                return self.dataset[index]
            except (FileNotFoundError, ValueError) as error:
                return error


def _generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(mix(*numbers))
