"""The training step: forward and backward over the parts of a batch, clipping, the optimizer, the average.

Everything random in it is seeded by the run's seed, the step and the image, so that neither the number of processes,
nor the parts, nor where a run was resumed changes what is drawn. There is no other step: whoever wants to know what a
training would do, as the doctor does, takes this one.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tardkd.data import to_float
from tardkd.data.seeds import mix
from tardkd.detectors.sampling import seed_samplers
from tardkd.distill import Distiller
from tardkd.train.batches import Part
from tardkd.train.config import Config, ConfigError
from tardkd.train.distributed import Processes
from tardkd.train.optim import build_optimizer, set_learning_rate

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Update:
    """A step in its parts, and all that it moves: :meth:`gradients`, :meth:`clip`, then :meth:`apply` or :meth:`drop`.

    >>> losses, stats = update.gradients(number, parts)
    >>> norm = update.clip()
    >>> update.apply(rate)
    """

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
        self._parameters = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        self._module: nn.Module = distiller
        if settings.sync_bn and processes.device.type != "cuda":
            raise ConfigError("train.sync_bn needs GPUs: torch knows BatchNorm over processes for them alone")
        if processes.count > 1:
            if settings.sync_bn:
                nn.SyncBatchNorm.convert_sync_batchnorm(distiller.student)
            with warnings.catch_warnings():  # newer torch has another name for what older torch knows as this alone
                warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
                self._module = DistributedDataParallel(distiller, broadcast_buffers=False, find_unused_parameters=False)

    @property
    def evaluated(self) -> nn.Module:
        """The model that a run is for: the average where there is one."""
        return self.distiller.student if self.average is None else self.average.module

    def gradients(
        self, step: int, parts: Sequence[Part], on_losses: Callable[[dict[str, Tensor]], None] = lambda losses: None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Leave in the parameters the gradient of the mean loss over the parts and processes.

        Args:
            step: its number in the run, from 0.
            parts: images N x (3, H, W) and targets, each as a forward and a backward of their own.
            on_losses: called with the losses of each part while their graph is there.

        Returns:
            This process's losses, their sum "loss" first, and the distiller's stats; means over the parts.

        Raises:
            FloatingPointError: the distiller met a NaN or infinity.
        """
        self.optimizer.zero_grad(set_to_none=True)
        if self._can_drop:
            self._buffers = [buffer.clone() for buffer in self.distiller.buffers()]
        losses_mean: dict[str, Tensor] = {}
        stats_mean: dict[str, Tensor] = {}
        for number, part in enumerate(parts):
            images, targets = self._on_device(part)
            self._seed_all(step, number, targets)
            with self._sharing(is_last=number == len(parts) - 1):
                with torch.autocast(self.processes.device.type, self._amp, enabled=self._amp is not None):
                    losses = self._module(images, targets)
                on_losses(losses)
                loss = sum(losses.values())
                self._scaler.scale(loss / len(parts)).backward()
            _add(losses_mean, {"loss": loss, **losses}, len(parts))
            _add(stats_mean, self.distiller.stats, len(parts))
        return losses_mean, stats_mean

    @property
    def expects_overflow(self) -> bool:
        """Gradients may be infinite now and then: the scaler then takes no step, and a smaller scale from there on."""
        return self._scaler.is_enabled()

    def clip(self) -> Tensor:
        """Shorten the gradient to the recipe's ``clip_norm``; returns the norm () that it had."""
        self._scaler.unscale_(self.optimizer)
        return torch.nn.utils.clip_grad_norm_(self._parameters, self._clip)

    def apply(self, rate: float) -> None:
        """Move the weights, at this learning rate."""
        set_learning_rate(self.optimizer, rate)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.distiller.student)

    def drop(self) -> None:
        """Forget the step; its batch statistics, too, which would keep a NaN for good."""
        for buffer, before in zip(self.distiller.buffers(), self._buffers):
            buffer.copy_(before)

    def state_dict(self) -> dict[str, Any]:
        """All that a step moves, but for the student that is evaluated: a checkpoint has that one beside this."""
        state = {"optimizer": self.optimizer.state_dict(), "scaler": self._scaler.state_dict()}
        if self.average is not None:
            state["student"], state["averaged"] = self.distiller.student.state_dict(), int(self.average.n_averaged)
        return state

    def load_state_dict(self, model: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned, and the student that was evaluated.

        Raises:
            ValueError: a tensor of the optimizer does not fit its parameter. Errors of other types come from torch.
        """
        self.evaluated.load_state_dict(model)
        if self.average is not None:
            self.distiller.student.load_state_dict(state["student"])
            self.average.n_averaged.fill_(state["averaged"])
        self._load_optimizer(state["optimizer"])
        if self._scaler.is_enabled():
            self._scaler.load_state_dict(state["scaler"])

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        """Take the tensors of the state alone: all settings are the recipe's, and the rate is set in every step."""
        own = self.optimizer.state_dict()["param_groups"]
        if [group["params"] for group in state["param_groups"]] != [group["params"] for group in own]:
            raise ValueError("the optimizer's parameters are not those of the run")
        self.optimizer.load_state_dict({"state": state["state"], "param_groups": own})
        for parameter, values in self.optimizer.state.items():
            for name, value in values.items():
                if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                    found, wanted = tuple(value.shape), tuple(parameter.shape)
                    raise ValueError(f"the optimizer's {name} has the shape {found} for a parameter of {wanted}")

    def _seed_all(self, step: int, part: int, targets: Sequence[dict[str, Any]]) -> None:
        seeds = [mix(self._seed, step, int(target["image_id"])) for target in targets]
        for sampler in self._samplers:
            sampler.seeds = seeds
        torch.manual_seed(mix(self._seed, step, self.processes.rank, part))  # for what else may draw

    @contextmanager
    def _sharing(self, *, is_last: bool) -> Iterator[None]:
        """Processes add up their gradients once a step, in the backward of the last part."""
        with nullcontext() if is_last or self.processes.count == 1 else self._module.no_sync():
            yield

    def _on_device(self, part: Part) -> Part:
        device = self.processes.device

        def moved(value: Any) -> Any:
            return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

        images, targets = part
        return to_float(images, device), [{k: moved(v) for k, v in target.items()} for target in targets]


def _add(means: dict[str, Tensor], values: dict[str, Tensor], parts: int) -> None:
    """Add one part's values () to the means over so many parts."""
    for name, value in values.items():
        value = value.detach().float() / parts
        means[name] = means[name] + value if name in means else value
