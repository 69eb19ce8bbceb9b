from __future__ import annotations

from tardkd.data.seeds import mix


def test_every_number_counts_and_so_does_its_sign():
    """COCO ids may be any integer."""
    numbers = [0, 1, -1, 7, -7, 2**40, -(2**63)]
    seeds = [mix(*pair) for pair in ((one, two) for one in numbers for two in numbers)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**64 for seed in seeds)
    assert mix(3, 5) == mix(3, 5)
