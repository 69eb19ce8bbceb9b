"""Batches whose order and views are pure functions of (seed, epoch), so that a resumed run goes on exactly."""

from __future__ import annotations

import signal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .coco import Target
from .seeds import mix


def build_loader(dataset: Dataset, *, batch_size: int, shuffle: bool, seed: int, epoch: int, workers: int = 0,
                 first_batch: int = 0, processes: int = 1, rank: int = 0, parts: int = 1,
                 pin_memory: bool = False) -> DataLoader:
    """Batches ``(images, targets)``: N float images (3, H, W) in [0, 1] and N target dicts.

    The order depends on (seed, epoch) alone and the random view of image ``index`` on (seed, epoch, index) alone, so
    neither the number of workers nor what was drawn before matters, and torch's global generator is left as it was.
    With ``shuffle`` an incomplete last batch is dropped unless it is the only one; without, all images come, in order.

    Of several processes each takes its share of every batch, in ``parts`` that come one after the other; without
    ``shuffle`` every image comes in one of them. Together the shares are the batch that one process would have.

    Args:
        batch_size: images, of all processes and parts together.
        first_batch: how many batches (parts) of the epoch to leave out at its beginning, to resume within it.
        pin_memory: for copies to a GPU that need not be waited for.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, found {batch_size}")
    count = len(dataset)
    if count == 0:
        raise ValueError("the data set has no images")
    if shuffle:
        order = torch.randperm(count, generator=_generator(seed, epoch))
        batches = [batch.tolist() for batch in order.split(batch_size)]
        if len(batches) > 1 and len(batches[-1]) < batch_size:
            batches.pop()
        batches = [part for batch in batches for part in _share(batch, processes, rank, parts)]
    else:
        order = torch.arange(rank, count, processes)
        batches = [batch.tolist() for batch in order.split(max(1, batch_size // (processes * parts)))]
    return DataLoader(_SeededItems(dataset, seed, epoch), batch_sampler=batches[first_batch:], collate_fn=collate,
                      num_workers=workers, pin_memory=pin_memory, generator=_generator(seed, epoch),
                      worker_init_fn=_ignore_termination)


def _share(batch: list[int], processes: int, rank: int, parts: int) -> list[list[int]]:
    size, rest = divmod(len(batch), processes * parts)
    if rest:
        into = f"{processes} processes times {parts} parts"
        raise ValueError(f"a batch of {len(batch)} images does not divide into {into}")
    first = rank * parts * size
    return [batch[first + part * size : first + (part + 1) * size] for part in range(parts)]


def _ignore_termination(worker: int) -> None:
    """A scheduler may send SIGTERM to all processes of a job: the one that trains ends them when it has saved."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def collate(items: list[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """Images of differing sizes stay a list; uint8 becomes float32 in [0, 1]."""
    images = [image.float() / 255 if image.dtype == torch.uint8 else image for image, _ in items]
    return images, [target for _, target in items]


class _SeededItems(Dataset):
    """``dataset`` with torch's CPU generator seeded for each item and restored after it."""

    def __init__(self, dataset: Dataset, seed: int, epoch: int) -> None:
        self.dataset, self.seed, self.epoch = dataset, seed, epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mix(self.seed, self.epoch, index))
            return self.dataset[index]


def _generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(mix(*numbers))
