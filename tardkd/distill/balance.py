"""How strongly each term pulls at the student, against the losses of the detector itself, and how strongly it is to."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .late import LateReader

# Times the detector's gradient, by our own choice. Measured in first steps: up to 4 with a recipe that helps, up to 20
# with a trained teacher and weights of 1, and 160 with a teacher that was never trained.
DWARFS = 30.0
SELDOM = 1024  # steps between two measurements, once a training is under way
# The pull of a term of weight 1 over that of the detector's losses, by our own choice. In the mean over short trainings
# of six pairs it gained more than a third of it.
SHARE = 1.0


class BalanceWarning(UserWarning):
    """A term pulls far more strongly at the student than the detector's own losses, or this cannot be measured."""


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


def pulls(
    losses: Mapping[str, Tensor], features: Sequence[Tensor], heads: Sequence[Tensor] = (), processes: int = 1
) -> dict[str, Tensor]:
    """The gradient norms (2,) at the student's features and in its heads: of its own losses, "detector", and each term.

    Args:
        losses: scalars (), as a distiller returns them.
        features: L x (N, C, H_l, W_l).
        heads: their parameters.
        processes: whose batches are taken together; if more than 1, all have to call this.
    """
    detector, terms = split_losses(losses)
    tensors = [tensor for tensor in (*features, *heads) if tensor.requires_grad]
    count = sum(level.requires_grad for level in features)
    nothing = detector.new_zeros((), dtype=torch.float32)

    def length(gradients: Sequence[Tensor]) -> Tensor:
        return torch.stack([gradient.float().norm() for gradient in gradients] or [nothing]).norm()

    def norms(value: Tensor) -> Tensor:
        if value.requires_grad:
            gradients = torch.autograd.grad(
                value, tensors, retain_graph=True, allow_unused=True, materialize_grads=True
            )
        else:
            gradients = tuple(torch.zeros_like(tensor) for tensor in tensors)
        at_features, of_heads = length(gradients[:count]), gradients[count:]
        if processes > 1:
            # Each process has maps of its own, which are a part of all, and the same parameters as the others.
            square = (at_features / processes).square()
            dist.all_reduce(square)
            at_features = square.sqrt()
            if of_heads:
                of_heads = (torch.cat([gradient.float().flatten() for gradient in of_heads]) / processes,)
                dist.all_reduce(of_heads[0])
        return torch.stack([at_features, length(of_heads)])

    return {name: norms(value) for name, value in {"detector": detector, **terms}.items()}


class Balance:
    """Factors that give each term a pull at the student of its weight times ``SHARE`` of the detector's.

    Losses of unlike pairs, heads and images differ by orders of magnitude; their pulls say what a step would do to the
    student. They are measured at its features, by which they reach backbone and pyramid, and in its heads, and the
    place where a term is stronger counts: in an FCOS trained alone the class term pulls 1.1 times as strongly as the
    detector at the features, and 4.2 times in the head. They are measured in each of the first steps and seldom from
    then on, as means that forget, and so follow a term whose gradient dwindles: only the schedule's lambda lets the
    help fade. Measured steps of several processes are those of all together, so that all have the same factors.
    """

    FIRST = 64  # steps that are all measured
    SELDOM = 8  # steps between two measurements after these
    MEMORY = 0.987  # what a mean keeps of its past, a step: half of it after 53
    MOST = 10.0  # times a term is strengthened at most, so that the rounding errors of equal models stay small

    def __init__(self) -> None:
        self._step = 0
        self._measured = 0  # the step that was measured last
        self._has_failed = False
        # of the detector and of each term, (2, 2): at the features and in the heads, weighted sum of norms, of weights
        self._sums: dict[str, Tensor] = {}
        self._reliefs: dict[str, Tensor] = {}  # () of each term, from the sums: most steps measure nothing

    def __call__(
        self,
        weights: Mapping[str, float],
        losses: Mapping[str, Tensor],
        features: Sequence[Tensor],
        heads: Sequence[nn.Module] = (),
    ) -> dict[str, Tensor | float]:
        """A factor () of each term for this step; the weight itself where nothing pulls at the student.

        Args:
            weights: of the terms: the pull that each shall have, where 1 is ``SHARE`` of that of the detector's losses.
            losses: scalars (), the detector's under its own names and the terms as ``distill_<term>``, unweighted.
            features: L x (N, C, H_l, W_l), the student's.
            heads: what runs behind these.

        Warns:
            BalanceWarning: once, where the graph of the losses can be walked only once, as that of a reentrant
                checkpoint. The weights are then the factors.
        """
        self._step += 1
        is_due = self._step <= self.FIRST or self._step % self.SELDOM == 0
        has_graph = torch.is_grad_enabled() and any(level.requires_grad for level in features)
        if is_due and has_graph and not self._has_failed:
            self._measure(losses, features, [weight for head in heads for weight in head.parameters()])
        return {name: weight * self._reliefs.get(name, 1.0) for name, weight in weights.items()}

    def state_dict(self) -> dict[str, Any]:
        """All that the factors of the next step depend on."""
        sums = {name: value.clone() for name, value in self._sums.items()}
        return {"step": self._step, "measured": self._measured, "sums": sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self._step, self._measured = state["step"], state["measured"]
        # A state from before heads were looked at has (2,) of each; these are measured anew.
        self._sums = {name: value.clone() for name, value in state["sums"].items() if value.dim() == 2}
        self._relieve()

    @torch.compiler.disable
    def _measure(self, losses: Mapping[str, Tensor], features: Sequence[Tensor], heads: Sequence[Tensor]) -> None:
        processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        try:
            found = pulls(losses, features, heads, processes)
        except RuntimeError as error:
            self._has_failed = True
            warnings.warn(
                "the terms cannot be balanced, because their pull at the student cannot be measured, and "
                "DistillSettings' weights are taken as plain factors: is there a checkpoint with use_reentrant=True? "
                f"({error})",
                BalanceWarning,
                stacklevel=2,
            )
            return
        kept = self.MEMORY ** (self._step - self._measured)
        self._measured = self._step
        for name, norms in found.items():
            # A step in which no gate is open says nothing of how strongly an open one pulls.
            counts = (norms > 0) & norms.isfinite()
            observation = torch.stack([norms.where(counts, 0.0), counts.to(norms)], dim=1)
            past = self._sums[name].to(norms.device) if name in self._sums else torch.zeros_like(observation)
            self._sums[name] = kept * past + observation
        self._relieve()

    def _relieve(self) -> None:
        """Find what terms of weight 1 are to be multiplied by."""
        means = {name: sums[:, 0] / sums[:, 1] for name, sums in self._sums.items()}
        detector = means.pop("detector", None)
        self._reliefs = {} if detector is None else {name: self._relief(detector, term) for name, term in means.items()}

    def _relief(self, detector: Tensor, term: Tensor) -> Tensor:
        """() of two mean norms (2,), where the term is the stronger one; 1 of a term that pulls nowhere."""
        ratios = SHARE * detector / term
        ratio = ratios.where(ratios.isfinite() & (ratios > 0), float("inf")).min()
        return torch.where(ratio.isfinite(), ratio.clamp(max=self.MOST), 1.0)


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
        at_features = torch.stack([norm[0] for norm in norms.values()])
        self._reader.read(at_features, partial(self._judge, self._step, list(norms), weights))

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
