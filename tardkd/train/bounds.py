"""The kinds of values that settings take. What lies beyond them ends in a message, not in a crash of what uses them."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from tardkd.weights import is_text


def _whole(text: str) -> str:
    if not is_text(text):
        raise ValueError("must be a text of whole characters without NUL")
    return text


Text = Annotated[str, AfterValidator(_whole)]  # a name or a path, which a file can be called by
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # torch's generators take 64 bits
Count = Annotated[int, Field(gt=0, le=10**9)]
Threads = Annotated[int, Field(gt=0, le=1024)]  # torch crashes where the system cannot start as many
Workers = Annotated[int, Field(ge=0, le=1024)]
Images = Annotated[int, Field(gt=0, le=10**6)]
Pixels = Annotated[int, Field(gt=0, le=2**14)]
Layers = Annotated[int, Field(gt=0, le=256)]
Channels = Annotated[int, Field(gt=0, le=2**14)]
Regions = Annotated[int, Field(gt=0, le=10**6)]
Factor = Annotated[float, Field(gt=0, le=16, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
