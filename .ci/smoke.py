"""What an installation must be able to do, wherever it came from: one op, forward and backward, and the command line.

Run by the environment's own Python from a folder without sources. It holds the compiled kernels against the reference.
"""

import subprocess
import sys
from pathlib import Path

import torch

import tardkd
from tardkd.ops import multiscale_roi_align, reference

package = Path(tardkd.__file__).parent
assert package.is_relative_to(sys.prefix), f"{package} is not this environment's"
assert (package / "py.typed").exists()
assert "cpu" in tardkd.build_info()["kernel_devices"], tardkd.build_info()

torch.manual_seed(0)
regions = torch.tensor([[0, 1.0, 2.0, 40.0, 50.0], [0, 10.0, 8.0, 200.0, 160.0]])
results = []
for op in (multiscale_roi_align, reference.multiscale_roi_align):
    pyramid = [torch.linspace(-1, 1, 8 * side * side).view(1, 8, side, side).requires_grad_() for side in (64, 32)]
    pooled = op(pyramid, regions, scales=(1 / 4, 1 / 8), output_size=7)
    pooled.square().sum().backward()
    results.append([pooled.detach(), *(level.grad for level in pyramid)])
for found, expected in zip(*results, strict=True):
    torch.testing.assert_close(found, expected)
assert all(level.any() for level in results[0])

subprocess.run([Path(sys.executable).parent / "tardkd", "info"], check=True)
print(f"tardkd {tardkd.__version__} with torch {torch.__version__}, from {package}")
