"""One update of the weights: forward and backward over the parts of a batch, clipping, the optimizer, the average.

Everything random in it is seeded by the run's seed, the step and the image, so that neither the number of processes,
nor the parts, nor where a run was resumed changes what is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tardkd.data import to_float
from tardkd.data.seeds import mix
from tardkd.device import HostCopy
from tardkd.distill import Distiller
from tardkd.train.config import Config, ConfigError
from tardkd.train.distributed import Processes
from tardkd.train.optim import build_optimizer, set_learning_rate
from tardkd.train.sampling import seed_samplers

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

Part = tuple[list[Tensor], list[dict[str, Any]]]  # images and targets


class Update:
    """The distiller's optimizer and what belongs to it."""

    def __init__(self, config: Config, distiller: Distiller, processes: Processes) -> None:
        settings = config.train
        self.distiller, self.processes = distiller, processes
        self.optimizer = build_optimizer(config.optimizer, distiller)
        self.average: AveragedModel | None = None  # exponential, of the student's weights and buffers
        if settings.ema is not None:
            average = get_ema_multi_avg_fn(settings.ema)
            self.average = AveragedModel(distiller.student, multi_avg_fn=average, use_buffers=True)
        self._scaler = torch.amp.GradScaler(processes.device.type, enabled=settings.amp == "fp16")
        self._amp = DTYPES.get(settings.amp)
        self._seed = settings.seed
        self._can_drop = settings.on_non_finite == "skip"
        self._clip = config.optimizer.clip_norm or math.inf
        self._samplers = seed_samplers(distiller.student)
        self._parameters = [one for group in self.optimizer.param_groups for one in group["params"]]
        self._module: nn.Module = distiller
        if settings.sync_bn and processes.device.type != "cuda":
            raise ConfigError("train.sync_bn needs GPUs: torch knows BatchNorm over processes for them alone")
        if processes.count > 1:
            if settings.sync_bn:
                nn.SyncBatchNorm.convert_sync_batchnorm(distiller.student)
            self._module = DistributedDataParallel(distiller, broadcast_buffers=False, find_unused_parameters=False)

    @property
    def evaluated(self) -> nn.Module:
        """The model that a run is for: the average where there is one."""
        return self.distiller.student if self.average is None else self.average.module

    def gradients(self, step: int, parts: Sequence[Part]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Leaves those of the mean over the parts and processes; returns the losses and the distiller's stats.

        Raises:
            FloatingPointError: the distiller met a NaN or infinity.
        """
        self.optimizer.zero_grad(set_to_none=True)
        if self._can_drop:
            self._buffers = [buffer.clone() for buffer in self.distiller.buffers()]
        losses_sum: dict[str, Tensor] = {}
        stats_sum: dict[str, Tensor] = {}
        for number, part in enumerate(parts):
            images, targets = self._on_device(part)
            seeds = [mix(self._seed, step, int(target["image_id"])) for target in targets]
            for sampler in self._samplers:
                sampler.seeds = seeds
            torch.manual_seed(mix(self._seed, step, self.processes.rank, number))  # of what else may draw
            is_last = number == len(parts) - 1
            with nullcontext() if is_last or self.processes.count == 1 else self._module.no_sync():
                with torch.autocast(self.processes.device.type, self._amp, enabled=self._amp is not None):
                    losses = self._module(images, targets)
                loss = sum(losses.values())
                self._scaler.scale(loss / len(parts)).backward()
            _add(losses_sum, {"loss": loss, **losses}, len(parts))
            _add(stats_sum, self.distiller.stats, len(parts))
        return losses_sum, stats_sum

    @property
    def expects_overflow(self) -> bool:
        """Gradients may be infinite: the scaler takes no step then, and a smaller scale."""
        return self._scaler.is_enabled()

    def clip(self) -> Tensor:
        """Returns the norm of the gradient before that."""
        self._scaler.unscale_(self.optimizer)
        return torch.nn.utils.clip_grad_norm_(self._parameters, self._clip)

    def apply(self, rate: float) -> None:
        """Moves the weights."""
        set_learning_rate(self.optimizer, rate)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.distiller.student)

    def drop(self) -> None:
        """As if the gradients had never been computed: batch statistics would keep a NaN for good."""
        for buffer, before in zip(self.distiller.buffers(), self._buffers):
            buffer.copy_(before)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the student that is evaluated."""
        state = {"optimizer": self.optimizer.state_dict(), "scaler": self._scaler.state_dict()}
        if self.average is not None:
            state["student"], state["averaged"] = self.distiller.student.state_dict(), int(self.average.n_averaged)
        return state

    def load_state_dict(self, model: dict[str, Tensor], state: dict[str, Any]) -> None:
        self.evaluated.load_state_dict(model)
        if self.average is not None:
            self.distiller.student.load_state_dict(state["student"])
            self.average.n_averaged.fill_(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self._scaler.is_enabled():
            self._scaler.load_state_dict(state["scaler"])

    def _on_device(self, part: Part) -> Part:
        device = self.processes.device

        def moved(value: Any) -> Any:
            return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

        images, targets = part
        return to_float(images, device), [{k: moved(v) for k, v in target.items()} for target in targets]


def _add(sums: dict[str, Tensor], values: dict[str, Tensor], parts: int) -> None:
    for name, value in values.items():
        value = value.detach().float() / parts
        sums[name] = sums[name] + value if name in sums else value


class Numbers:
    """Named scalars of all processes, on their way to the host."""

    def __init__(self, values: dict[str, Tensor], processes: Processes) -> None:
        self._names = list(values)
        self._own = torch.stack(list(values.values()))
        self._mean = HostCopy(processes.mean(self._own.clone()))

    def mean(self) -> dict[str, float]:
        """Over all processes."""
        return dict(zip(self._names, self._mean.tolist()))

    def own(self) -> dict[str, float]:
        return dict(zip(self._names, self._own.tolist()))
