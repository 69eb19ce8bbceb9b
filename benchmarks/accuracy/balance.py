"""A weight for every term from how strongly it pulls at the student, in place of one that somebody has searched for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from tardkd.distill.balance import pulls


class Balance:
    """Scales each term so that its gradient at the student's features has a fixed share of the detector's own.

    The norms are means over the first steps. From then on the factors stay, so that a term may die away as the student
    comes to agree with its teacher; or, ``lasting``, they follow running means, so that only the schedule's lambda
    makes the help fade. With the share None it measures, and leaves the terms as they are.
    """

    STEPS = 64  # at first
    SELDOM, MEMORY = 8, 0.9  # then every so many steps, what was found before keeping this share

    def __init__(self, share: float | None, *, lasting: bool = False) -> None:
        self.share, self.lasting = share, lasting
        self.factors: dict[str, float] = {}
        self._means: dict[str, float] = {}
        self._count = 0

    def __call__(
        self, losses: Mapping[str, Tensor], features: Sequence[Tensor], schedule: float = 1.0
    ) -> dict[str, Tensor]:
        """The losses, those named ``distill_*`` with their factors.

        Args:
            losses: scalars (), as a distiller returns them.
            features: L x (N, C, H_l, W_l), the student's.
            schedule: lambda, which the terms have in them.
        """
        self._count += 1
        first = self._count <= self.STEPS
        if schedule and (first or (self.lasting and self._count % self.SELDOM == 0)):
            self._measure(losses, features, schedule, 1 - 1 / self._count if first else self.MEMORY)
        return {name: value * self.factors.get(name, 1.0) for name, value in losses.items()}

    def _measure(
        self, losses: Mapping[str, Tensor], features: Sequence[Tensor], schedule: float, memory: float
    ) -> None:
        for name, norm in pulls(losses, features).items():
            found = norm[0].item() / (1.0 if name == "detector" else schedule)
            self._means[name] = memory * self._means.get(name, 0.0) + (1 - memory) * found
        if self.share is not None:
            self.factors = {
                f"distill_{name}": self.share / pull if pull else 1.0 for name, pull in self.pulls().items()
            }

    def pulls(self) -> dict[str, float]:
        """Each term's gradient norm before it was scaled, over the detector's."""
        detector = self._means.get("detector", 0.0)
        return {name: mean / detector for name, mean in self._means.items() if name != "detector" and detector}
