"""The three parts of a recipe that can be trained."""

from __future__ import annotations

from typing import Literal, get_args

Role = Literal["teacher", "baseline", "distilled"]
ROLES: tuple[Role, ...] = get_args(Role)
