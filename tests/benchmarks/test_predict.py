"""Predictions from counts, on counts made by hand; the counting itself wants nvcc."""

from __future__ import annotations

import json

import counts
import predict
import pytest
import torch
from devices import DEVICES, Device

DEVICE = Device("made up", "9.0", 10, 1e9, 1e12, 1 << 20, 100 << 10, 2048)
LAUNCH = predict.LAUNCH_SECONDS


def instruction(text, warps, units=0, fewest=0):
    return counts.Instruction(text, "pool.cuh:1", 1, warps, 32 * warps, units, fewest, 0)


def kernel(*code, blocks=1000, threads=256, shared=0, name="kernel<float>"):
    return counts.Kernel(name, 1, blocks, blocks * threads, shared, list(code))


def counted(*kernels, memory=0, torch_launches=0, torch_bytes=0):
    return predict.Counts(list(kernels), {"made up": memory}, torch_launches, torch_bytes, 0, 0.0)


def seconds(*arguments, **options):
    return predict.predict(counted(*arguments, **options), DEVICE, "made up", {})


@pytest.mark.parametrize(
    "code, memory, bound_by, expected",
    [
        ([instruction("ld.global.f32 %f1, [%rd1]", 1, 4, 4)], 10**9, "memory", 8e-3),
        ([instruction("ld.global.f32 %f1, [%rd1]", 1, 10**7, 10**7)], 0, "second level", 8 * 32e7 / (64 * 10e9)),
        ([instruction("add.f32 %f1, %f1, %f1", 10**7)], 0, "instructions", 8 * 1e7 / (4 * 10e9)),
        ([instruction("ld.shared.f32 %f1, [%r1]", 1, 10**7, 10**6)], 0, "shared memory", 8 * 1e7 / 10e9),
    ],
)
def test_a_kernel_takes_as_long_as_what_is_busiest(code, memory, bound_by, expected):
    prediction = seconds(kernel(*code), memory=memory)
    assert prediction.bound_by == f"{bound_by} of kernel<float>"
    assert prediction.device_seconds == pytest.approx(expected + LAUNCH)


def test_what_torch_launches_counts_too():
    assert seconds(torch_launches=3, torch_bytes=10**9).device_seconds == pytest.approx(8e-3 + 3 * LAUNCH)


def test_a_grid_too_small_leaves_multiprocessors_idle():
    add = instruction("add.f32 %f1, %f1, %f1", 10**7)
    whole, small = seconds(kernel(add, blocks=10)), seconds(kernel(add, blocks=1))
    assert small.device_seconds - LAUNCH == pytest.approx((whole.device_seconds - LAUNCH) * 10 / 8)


@pytest.mark.parametrize(
    "registers, shared, expected", [(32, 0, 8), (80, 0, 3), (81, 0, 2), (32, 24 << 10, 4), (255, 200 << 10, 1)]
)
def test_blocks_at_once(registers, shared, expected):
    assert predict.blocks_at_once(kernel(shared=shared), DEVICE, registers) == expected


def test_registers_of_every_device():
    """The table of results/ptxas.md has the kernels and the devices' capabilities."""
    found = predict.registers_of((predict.RESULTS / "ptxas.md").read_text())
    assert {"region_distill_kernel<float>", "gaussian_loss_kernel<float>", "roi_align_kernel<float>"} <= found.keys()
    for registers in found.values():
        assert {device.capability for device in DEVICES.values()} <= registers.keys()
        assert all(1 <= count <= 255 for count in registers.values())


def test_bytes_of_what_torch_launches():
    maps, other = torch.zeros(8, 8), torch.zeros(8, 8)
    with predict.TorchTraffic() as traffic:
        maps.view(-1)[3:].t()
        torch.empty(5)
        assert (traffic.launches, traffic.bytes) == (0, 0)
        torch.zeros(16)
        assert (traffic.launches, traffic.bytes) == (1, 64)
        _ = maps * other
        assert (traffic.launches, traffic.bytes) == (2, 64 + 3 * 256)


def test_the_host_path_of_every_step():
    for step in counts.STEPS.values():
        assert 0 < predict.host_seconds(step) < 1


def test_predicted_beside_measured():
    info = dict(
        op="region_distill_loss", gate="all", side="tardkd", case="cuda float32 NCHW", device="NVIDIA H100 80GB"
    )
    info |= dict(sizes=predict.SIZES_OF_ALL, device_seconds=3e-3)
    stats = dict(median=1.0)
    others = [info | dict(side="eager"), info | dict(case="cpu float32 NCHW"), info | dict(sizes="1 x 1")]
    measured = {"benchmarks": [{"extra_info": one, "stats": stats} for one in (info, *others)]}
    predicted = {"H100": {"region, all open | float32 NCHW": 2e-3}}
    table = predict.beside(measured, predicted).splitlines()
    assert table[2:] == ["| region, all open | float32 NCHW | 2.000 | 3.000 | 1.50 |"]
    assert predict.beside({"benchmarks": measured["benchmarks"][1:]}, predicted).startswith("no prediction")


@pytest.mark.ptx
def test_counts_of_a_step():
    """What follows from the shapes alone: each gradient of pooled features is written once, as whole sectors."""
    workload = counts.inputs("float32", "NCHW", **predict.TINY)
    [kernel] = [one for one in counts.count(counts.STEPS["pooled, all open"], workload) if "pooled" in one.name]
    assert kernel.blocks % len(workload.labels) == 0
    gradient = workload.pooled[0].numel() * 4 // 32
    stored = [i for i in kernel.code if i.access == "global store" and i.warps]
    assert gradient <= sum(i.units for i in stored) < 1.1 * gradient + 16 * len(workload.labels)
    assert sum(kernel.by_kind().values()) == kernel.instructions
    everything = predict.count("pooled, all open", workload)
    floor = everything.floor_bytes
    assert all(0.9 * floor < everything.memory[key] < 2 * floor for key in DEVICES)
    table = predict.report({"pooled | float32 NCHW": everything}, DEVICES["H100"], "H100", {}, "this much")
    assert table.splitlines()[-1].startswith("| pooled | float32 NCHW | ")
    json.dumps(everything.memory)


@pytest.mark.ptx
@pytest.mark.parametrize("name", ["region, all open", "roi_align", "gaussian"])
@pytest.mark.parametrize("layout", counts.LAYOUTS)
def test_a_share_of_the_channels_stands_for_all(name, layout):
    """Behind a cache that holds a small part of the maps; where regions are pooled some stays from group to group."""

    def traffic(share: int) -> int:
        sizes = predict.TINY | dict(channels=256 // share, classes=80 // share, regions=48)
        workload = counts.inputs("float32", layout, **sizes)
        module = counts.ptx_on_cpu.load()
        part = min(share, predict.cache_share(name))
        module.add_cache((1 << 20) // part, 16 // part)
        counts.count(counts.STEPS[name], workload)
        [(read, written)] = module.traffic()
        return share * (read + written)

    assert traffic(4) == pytest.approx(traffic(1), rel=0.05 if name == "gaussian" else 0.15)
