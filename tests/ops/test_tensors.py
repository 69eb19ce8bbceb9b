"""Tensors of a torch that does not describe them to C: the compiled module reads their attributes."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]

PROGRAM = """
import torch
if hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
    del torch.Tensor.__dlpack_c_exchange_api__
import tardkd.ops, tardkd.ops.reference
from ops.scenes import make_scene
from tardkd.ops import checks
from tardkd.ops.inputs import RegionInputs

def results(ops, dtype):
    scene = make_scene(1).to(dtype, None, "channels_last", "sliced")
    assert not checks.fit(RegionInputs(*scene.per_region), "softmax")  # which it only finds of described ones
    losses = ops.region_distill_loss(*scene.inputs, **scene.scales, region_weights=scene.region_weights)
    return [*losses, *torch.autograd.grad(losses[:3], scene.leaves, list(map(torch.ones_like, losses[:3])))]

for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for one, other in zip(results(tardkd.ops, dtype), results(tardkd.ops.reference, dtype)):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-4)
print("the same")
"""


def test_without_a_description_for_c():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "the same", done.stderr
