"""What distillation gains, beside the strongest rivals; ``python -m benchmarks.accuracy -h``."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # for the losses that it shares with the timings, in rivals.py
