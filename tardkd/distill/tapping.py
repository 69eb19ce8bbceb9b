"""A tap behind the student's pyramid, at which the feature term's gradient is added to the detector's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from tardkd.ops import FeatureTap, tap_features
from tardkd.ops.checks import FEATURE_DTYPES


@contextmanager
def tapped_maps(module: nn.Module | None, losses: int) -> Iterator[list[FeatureTap]]:
    """Put a tap for so many ``losses`` behind the maps (N, C, H, W) of the module's first call in this context.

    What stands in the place of the maps is the same for all who read it. The list has the tap once there is one.
    """
    taps: list[FeatureTap] = []

    def hand_out(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        leaves, structure = tree_flatten(output)
        maps = {id(leaf): leaf for leaf in leaves if _is_map(leaf)}
        if taps or not maps:
            return None
        taps.append(tap_features(list(maps.values()), losses=losses))
        handed = dict(zip(maps, taps[0].features))
        return tree_unflatten([handed.get(id(leaf), leaf) for leaf in leaves], structure)

    handle = module.register_forward_hook(hand_out) if module is not None and losses > 0 else None
    try:
        yield taps
    finally:
        if handle is not None:
            handle.remove()


def _is_map(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() == 4 and leaf.dtype in FEATURE_DTYPES
