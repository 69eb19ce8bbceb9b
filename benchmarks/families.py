"""What distilling costs beside the teacher's forward, for every family of students and of teachers.

    python benchmarks/families.py --out FOLDER

Writes families.json and families.md. Small detectors of each family with random weights, on random images; all gates
of the foreground are open, which is the most work that there can be. A student's own step, its teacher's forward and
the distilled step run in turn, so that a slow moment of the machine meets them all, and what is left of the distilled
step is the overhead. Time is a core's, so that other programs of the machine count little.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from report import table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import tardkd
from tardkd.detectors import for_model
from tardkd.detectors.base import StudentPass
from tardkd.distill import Distiller, DistillSettings
from tardkd.train.models import ModelSpec, build_model

CLASSES, IMAGES, OBJECTS, SIDE, ROUNDS = 20, 2, 8, 320, 5
NAMES = [f"class {number}" for number in range(CLASSES)]
LIGHT = {"blocks": (2, 2, 2, 2), "fpn_channels": 128, "min_size": SIDE, "max_size": SIDE}
# A ResNet-18 with a pyramid, or what is as small in its family.
SPECS = {
    "faster_rcnn": ModelSpec(**LIGHT, head_dim=512),
    "retinanet": ModelSpec(**LIGHT, head="retinanet", anchor_sizes=(32, 64, 128, 256)),
    "fcos": ModelSpec(**LIGHT, head="fcos"),
    "ssdlite": ModelSpec(name="ssdlite320_mobilenet_v3_large"),
    "rt_detr_v2": ModelSpec(model="tardkd.train.query_models:rt_detr_v2_r18"),
    "d_fine": ModelSpec(model="tardkd.train.query_models:d_fine_r18"),
}
# Without what a distiller adds by default: to standardise features, and to measure how the terms pull in one of eight
# steps.
SETTINGS = DistillSettings(
    feature_gate="foreground",
    classification_gate="foreground",
    regression_gate="foreground",
    feature_norm="none",
    balance="none",
)
OPS = ("region_distill", "pooled_distill")


class OwnOps(TorchDispatchMode):
    """How often each of tardkd's fused ops runs meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = dict.fromkeys(OPS, 0)

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if op.namespace == "tardkd" and op._opname in self.counts:
            self.counts[op._opname] += 1
        return op(*args, **(kwargs or {}))


def images_and_targets() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Noise, and objects of a tenth to a half of its side."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, SIDE, SIDE, generator=generator) for _ in range(IMAGES)]
    targets = []
    for _ in range(IMAGES):
        size = SIDE * (0.1 + 0.4 * torch.rand(OBJECTS, 2, generator=generator))
        low = (SIDE - size) * torch.rand(OBJECTS, 2, generator=generator)
        labels = torch.randint(1, CLASSES + 1, (OBJECTS,), generator=generator)
        targets.append({"boxes": torch.cat([low, low + size], 1), "labels": labels})
    return images, targets


def build(family: str, seed: int, images: list[Tensor]) -> nn.Module:
    """A detector whose BatchNorm has the images' statistics: with others, maps of random weights would explode."""
    torch.manual_seed(seed)
    model = build_model(SPECS[family], CLASSES)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    detector = for_model(model.train())
    with torch.no_grad():
        detector.call(detector.read_call(*images_and_targets()))
    for norm, momentum in zip(norms, before):
        norm.momentum = momentum
    return model


@dataclass
class Pair:
    """A student and its teacher; a step leaves the weights as they are, and names the same regions each time."""

    student_family: str
    teacher_family: str

    def __post_init__(self) -> None:
        self.batch = images_and_targets()
        self.student = build(self.student_family, 1, self.batch[0])
        self.teacher = build(self.teacher_family, 2, self.batch[0])
        names = {"student_classes": NAMES, "teacher_classes": NAMES}
        self.distiller = Distiller(self.student, self.teacher, SETTINGS, **names).train()
        self.optimizer = torch.optim.SGD(self.distiller.parameters(), lr=0.0, momentum=0.9)
        detector = for_model(self.student)
        torch.manual_seed(3)
        with torch.no_grad():
            self.student_pass: StudentPass = detector.student_pass(detector.read_call(*self.batch))

    def alone(self) -> None:
        detector = for_model(self.student)
        self._step(lambda: detector.call(detector.read_call(*self.batch))[1])

    @torch.no_grad()
    def teacher_forward(self) -> None:
        """Trunk, pyramid and head. A box head runs on the student's regions, or on as many proposals of its own."""
        detector, regions = for_model(self.teacher), self.student_pass.regions
        ratio = detector.input_size / for_model(self.student).input_size
        passed = detector.teacher_pass(self.batch[0], self.student_pass.inputs, ratio)
        if detector.two_stage:
            if for_model(self.student).head.regions == "objects":
                detector.teacher_proposals(passed)
            detector.answers(passed, regions, regions.labels - 1)

    def distilled(self) -> None:
        self._step(lambda: self.distiller(*self.batch))

    def _step(self, forward: Callable[[], dict[str, Tensor]]) -> None:
        torch.manual_seed(3)
        losses = forward()
        self.optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        self.optimizer.step()

    def measure(self, rounds: int) -> dict[str, Any]:
        """The times of all three, and which of the fused ops one distilled step runs, forward and backward."""
        sides = {"alone": self.alone, "teacher": self.teacher_forward, "distilled": self.distilled}
        for run in (*sides.values(), self.distilled):  # in whose first two steps the distiller watches its terms, too
            run()
        with OwnOps() as called:
            self.distilled()
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(rounds):
            order = list(sides.items())
            for name, run in order if number % 2 else reversed(order):  # nobody always follows the same
                began = time.process_time()
                run()
                seconds[name].append(time.process_time() - began)
        return {
            "student": self.student_family,
            "teacher": self.teacher_family,
            "regions": len(self.student_pass.regions.labels),
            "ops": {name: count for name, count in called.counts.items() if count},
            "seconds": seconds,
        }


# --- the report -----------------------------------------------------------------------------------------------------


def overheads(result: dict[str, Any]) -> list[float]:
    """Of each round, in seconds."""
    return [
        distilled - alone - teacher
        for alone, teacher, distilled in zip(*(result["seconds"][name] for name in ("alone", "teacher", "distilled")))
    ]


def report(content: dict[str, Any]) -> str:
    """Tables in Markdown: of the overheads of all pairs, and behind each its parts."""
    results = content["pairs"]
    lines = [
        "# The step's overhead, family by family",
        "",
        "Written by `python benchmarks/families.py`. What a distilled step takes beyond the student's own step and the",
        f"teacher's forward, medians of {content['rounds']} rounds in seconds of a core. {content['about']}",
        "All gates of the foreground are open; features are not standardised, and the terms not balanced.",
        "",
        *(f"- {key}: {value}" for key, value in content["circumstances"].items()),
        "",
        "## As a share of the student's own step",
        "",
        "A row a student, a column a teacher.",
        "",
    ]
    shares = {(r["student"], r["teacher"]): share(r) for r in results}
    teachers = list(dict.fromkeys(result["teacher"] for result in results))
    students = list(dict.fromkeys(result["student"] for result in results))
    lines += table(
        ("student", *teachers),
        [(s, *(f"{shares[s, t]:+.0%}" if (s, t) in shares else "" for t in teachers)) for s in students],
    )
    lines += ["## In milliseconds", "", "±: half the interquartile range, of the overhead.", ""]
    lines += table(
        ("student", "teacher", "regions", "student's step", "teacher's forward", "distilled step", "overhead", "op"),
        [
            (
                result["student"],
                result["teacher"],
                result["regions"],
                *(f"{1e3 * statistics.median(result['seconds'][k]):.0f}" for k in ("alone", "teacher", "distilled")),
                f"{1e3 * statistics.median(overheads(result)):.0f} ± {1e3 * half_range(overheads(result)):.0f}",
                ", ".join(f"{count} x {name}" for name, count in result["ops"].items()),
            )
            for result in results
        ],
    )
    return "\n".join(lines)


def share(result: dict[str, Any]) -> float:
    """The overhead by the student's own step."""
    return statistics.median(overheads(result)) / statistics.median(result["seconds"]["alone"])


def half_range(values: list[float]) -> float:
    """Half the interquartile range."""
    low, _, high = statistics.quantiles(values, method="inclusive")
    return (high - low) / 2


def processor() -> str:
    """Its name, where the machine tells."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def tardkd_commit() -> str:
    """The checkout's."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--students", nargs="+", choices=SPECS, default=list(SPECS))
    parser.add_argument("--teachers", nargs="+", choices=SPECS, default=list(SPECS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for student, teacher in itertools.product(arguments.students, arguments.teachers):
        results.append(Pair(student, teacher).measure(arguments.rounds))
        print(f"{student} <- {teacher}: {share(results[-1]):+.1%}", file=sys.stderr, flush=True)
    content = {
        "about": f"{IMAGES} images of {SIDE} x {SIDE} with {OBJECTS} objects each, {CLASSES} classes.",
        "rounds": arguments.rounds,
        "circumstances": {
            "machine": f"{processor()}, one thread",
            "commit": tardkd_commit(),
            "tardkd": tardkd.__version__,
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
        "pairs": results,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "families.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    (arguments.out / "families.md").write_text(report(content), encoding="utf-8")


if __name__ == "__main__":
    main()
