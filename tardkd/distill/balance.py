"""How strongly each term pulls at the student, against the losses of the detector itself."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from .late import LateReader

# Times the detector's gradient, by our own choice. Measured in first steps: up to 4 with a recipe that helps, up to 20
# with a trained teacher and weights of 1, and 160 with a teacher that was never trained.
DWARFS = 30.0
SELDOM = 1024  # steps between two measurements, once a training is under way


class BalanceWarning(UserWarning):
    """A term pulls far more strongly at the student than the detector's own losses."""


def gradient_norm(value: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """The length () of the gradient of ``value``, (), by all ``tensors``, of any shape, together; keeps the graph.

    Where the tensors are the student's features, this goes back through heads alone and leaves every parameter's
    ``grad`` and DDP's hooks untouched.
    """
    gradients = torch.autograd.grad(value, tensors, retain_graph=True, allow_unused=True)
    norms = [gradient.float().norm() for gradient in gradients if gradient is not None]
    return torch.stack(norms).norm() if norms else value.new_zeros((), dtype=torch.float32)


def split_losses(losses: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum () of the detector's losses, and each term () of the distillation under its name in the settings."""
    detector = [value for name, value in losses.items() if not name.startswith("distill_")]
    terms = {name.removeprefix("distill_"): value for name, value in losses.items() if name.startswith("distill_")}
    return torch.stack(detector).sum(), terms


def pulls(losses: Mapping[str, Tensor], features: Sequence[Tensor]) -> dict[str, Tensor]:
    """The gradient norms () at the student's features: of its own losses together, "detector", and of each term.

    Args:
        losses: scalars (), as a distiller returns them.
        features: L x (N, C, H_l, W_l).
    """
    shared = [level for level in features if level.requires_grad]
    detector, terms = split_losses(losses)
    return {
        name: gradient_norm(value, shared)
        for name, value in {"detector": detector, **terms}.items()
        if value.requires_grad
    }


class BalanceWatch:
    """Warns once when a term dwarfs the detector: the student would learn little else, and may well diverge.

    It measures in steps 1, 2, 4, 8 and so on, and later every ``SELDOM`` steps. A GPU is not waited for. On a CPU a
    measured step took 7 to 40 % longer, most for the smallest models, and the others as long as before.
    """

    def __init__(self) -> None:
        self._reader = LateReader()
        self._step = 0
        self._has_warned = False  # or cannot measure

    def __call__(self, losses: Mapping[str, Tensor], features: Sequence[Tensor], weights: Mapping[str, float]) -> None:
        """Look at a step, where it is one to be measured.

        Args:
            losses: scalars (), as a distiller returns them.
            features: L x (N, C, H_l, W_l).
            weights: of the terms, in the settings.
        """
        self.settle()
        self._step += 1
        is_due = self._step % SELDOM == 0 or (self._step < SELDOM and self._step & (self._step - 1) == 0)
        has_graph = torch.is_grad_enabled() and any(level.requires_grad for level in features)
        if self._has_warned or not is_due or not has_graph or torch.compiler.is_compiling():
            return
        try:
            norms = pulls(losses, features)
        except RuntimeError:  # a graph that can be walked only once, such as that of a reentrant checkpoint
            self._has_warned = True
            return
        if "detector" in norms:
            judge = partial(self._judge, self._step, list(norms), weights)
            self._reader.read(torch.stack(list(norms.values())), judge)

    def settle(self) -> None:
        """Warn of what has not been read yet."""
        self._reader.settle()

    def _judge(self, step: int, names: list[str], weights: Mapping[str, float], values: list[float]) -> None:
        norms = dict(zip(names, values))
        detector = norms.pop("detector")
        ratios = {name: norm / detector for name, norm in norms.items()} if detector > 0 else {}
        strong = {name: ratio for name, ratio in ratios.items() if ratio > DWARFS}
        if self._has_warned or not strong:
            return
        self._has_warned = True
        found = ", ".join(f"distill_{name} {ratio:.3g} times" for name, ratio in strong.items())
        lower = ", ".join(f"{name} to {weights[name] / ratio:.1g} at most" for name, ratio in strong.items())
        warnings.warn(
            f"in step {step} distill terms pull far more strongly at the student's features than all of the detector's "
            f"own losses: {found}. The student would learn little else. Is the teacher trained, and are its weights "
            f"loaded (load_teacher_weights)? If so, lower the weight in DistillSettings: {lower}",
            BalanceWarning,
            stacklevel=2,
        )
