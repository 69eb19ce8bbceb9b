"""Random inputs for everything that takes some: ``python -m tests.fuzz --seconds 60 --seed 0``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for tolerances.py, which pytest finds by itself
