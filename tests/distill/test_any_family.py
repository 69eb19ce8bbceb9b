"""What the pages promise of any pair, held by each family: precision, processes, several teachers, input sizes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from detectors.tiny import tiny_dense
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tardkd.detectors import Detector, for_model
from tardkd.distill import Distiller, DistillSettings, ScheduleSettings, Teacher
from tardkd.train.models import freeze_norm

from . import families
from .families import NAMES, planted

OPEN = {"feature_gate": "foreground", "classification_gate": "foreground", "regression_gate": "foreground"}
TERMS = ("distill_feature", "distill_classification", "distill_regression")
QUERIES = ("rt_detr_v2", "d_fine")
FAMILIES = ("retinanet", "fcos", "ssdlite", *QUERIES)
each_family = pytest.mark.parametrize("family", FAMILIES)


def model(family: str, seed: int = 0, **options: Any) -> nn.Module:
    """A student (seed 0) or teacher; those with queries have learnt something, else theirs are all alike."""
    if family in QUERIES:
        return families.trained(family) if seed else families.begun(family)
    return tiny_dense(family, seed=seed, **options)


def detector(model: nn.Module, size: int = 64) -> Detector:
    """As it sees images of 64 pixels when they are resized to ``size``."""
    if not hasattr(model, "config"):
        return for_model(model)
    return type(for_model(model))(model, min_size=size)


def pair(family: str, **settings: Any) -> Distiller:
    student, teacher = (detector(model(family, seed)) for seed in (0, 1))
    return Distiller(student, teacher, DistillSettings(**OPEN, **of(family), **settings)).train()


def of(family: str) -> dict[str, float]:
    """The settings of terms that only some families have."""
    return {"distribution": 1.0} if family == "d_fine" else {}


def step(distiller: nn.Module, batch: families.Batch | None = None) -> dict[str, Tensor]:
    torch.manual_seed(5)
    return distiller(*(batch or planted()))


def trained(distiller: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in distiller.parameters() if weight.requires_grad]


def gradients(distiller: nn.Module) -> dict[str, Tensor]:
    return {name: weight.grad.clone() for name, weight in distiller.named_parameters() if weight.grad is not None}


@each_family
def test_bfloat16_is_about_float32(family: str) -> None:
    distiller = pair(family, balance="none")
    exact = step(distiller)
    with torch.autocast("cpu", torch.bfloat16):
        losses = step(distiller)
    assert all(losses[name].dtype == torch.float32 for name in TERMS)
    near = 0.3 if family in QUERIES else 0.03  # rounding makes a few of the encoder's best cells other queries
    for name, value in losses.items():
        assert value.item() == pytest.approx(exact[name].item(), rel=near), name
    torch.stack(list(losses.values())).sum().backward()
    found = gradients(distiller)
    assert len(found) == len(trained(distiller)) and all(value.isfinite().all() for value in found.values())


@each_family
def test_a_step_again_is_the_same_step(family: str) -> None:
    found = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            distiller = pair(family)
            losses = step(distiller)
            torch.stack(list(losses.values())).sum().backward()
            found.append((losses, gradients(distiller)))
    finally:
        torch.use_deterministic_algorithms(False)
    for first, second in zip(*found):
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# --- the teachers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 96])
@each_family
def test_a_teacher_of_another_input_size(family: str, size: int) -> None:
    options = {} if family in QUERIES else {"size": size}
    teacher = detector(model(family, 1, **options), size)
    distiller = Distiller(detector(model(family)), teacher, DistillSettings(**OPEN)).train()
    seen: list[tuple[int, ...]] = []
    teacher.backbone.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    losses = step(distiller)
    assert seen == [(2, 3, size, size)]
    torch.stack([losses[name] for name in TERMS]).sum().backward()
    assert all(0 < losses[name] < float("inf") for name in TERMS)
    assert any(gradient.any() for gradient in gradients(distiller).values())


@pytest.mark.parametrize("second", ["alike", "faster_rcnn"])
@each_family
def test_two_teachers_are_each_as_alone_weighted_by_their_open_gates(family: str, second: str) -> None:
    """The first teaches two of the three classes, the second the other."""
    other = model(family, 1) if second == "alike" else families.build(second, 1)
    teachers = [
        Teacher(detector(model(family, 1)), NAMES, {"box": None}),
        Teacher(detector(other), NAMES, {"disc": None, "bar": None}),
    ]
    shared = of(family) if second == "alike" else {}
    settings = DistillSettings(**OPEN, **shared, feature_norm="none", balance="none")
    terms = [f"distill_{name}" for name, weight in settings.weights.items() if weight]
    found = []
    for chosen in (teachers, teachers[:1], teachers[1:]):
        distiller = Distiller(detector(model(family)), chosen, settings, student_classes=NAMES).train()
        losses = step(distiller)
        found.append({name: losses[name].item() for name in terms} | {"count": distiller.stats["foreground"].item()})
    both, *alone = found
    counts = [one["count"] for one in alone]  # all gates of the foreground are open
    assert all(counts) and both["count"] == sum(counts)
    for name in terms:
        expected = sum(one[name] * count for one, count in zip(alone, counts)) / sum(counts)
        assert both[name] == pytest.approx(expected, rel=1e-4), name


# --- processes --------------------------------------------------------------------------------------------------------


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@each_family
def test_every_parameter_gets_a_gradient_in_every_step(family: str, process_group: None) -> None:
    """With objects, without any, and after the schedule's end: DDP would refuse the step after a gap."""
    distiller = pair(family, schedule=ScheduleSettings(stop=0.5))
    distiller.start(2, 2)
    wrapped = DistributedDataParallel(distiller)
    images, targets = planted()
    nothing = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)} for _ in targets]
    for epoch, number, truth in ((0, 0, targets), (0, 1, nothing), (1, 0, targets), (1, 1, nothing)):
        distiller.set_progress(epoch, number)
        wrapped.zero_grad()
        torch.stack(list(step(wrapped, (images, truth)).values())).sum().backward()
        assert len(gradients(distiller)) == len(trained(distiller))


def alike(family: str, seed: int) -> nn.Module:
    """One that treats an image alike in any batch: no statistics of other images, no noise."""
    one = model(family, seed)
    freeze_norm(one)
    if family in QUERIES:
        one.config.num_denoising = 0
        del one.model.denoising_class_embed
    return one


def shared_step(family: str, kind: str, processes: int = 1, rank: int = 0) -> dict[str, Tensor]:
    """The gradients of a step of which each process has its share of the two images.

    Args:
        kind: "terms": of the distillation alone, with unlike numbers of objects in the images; "all": of all losses,
            balanced, with the same objects in both.
    """
    models = [detector(alike(family, seed)) for seed in (0, 1)]
    balance = "gradient" if kind == "all" else "none"
    settings = DistillSettings(**OPEN, **of(family), feature_norm="none", balance=balance)
    distiller: nn.Module = Distiller(*models, settings).train()
    images, targets = planted()
    if kind == "all":
        targets = [targets[0], targets[0]]
    if processes > 1:
        distiller = DistributedDataParallel(distiller)
        images, targets = images[rank::processes], targets[rank::processes]
    losses = step(distiller, (images, targets))
    wanted = [value * (kind == "all" or name.startswith("distill_")) for name, value in losses.items()]
    torch.stack(wanted).sum().backward()
    return {name.removeprefix("module."): value for name, value in gradients(distiller).items()}


STEPS = [(family, kind) for family in FAMILIES for kind in ("terms", "all")]


def one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {kind: shared_step(*kind, processes=2, rank=rank) for kind in STEPS}
    if rank == 0:
        torch.save(found, f"{folder}/gradients.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Tensor]]:
    """The gradients of all steps with an image in each process."""
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(one_of_two, (str(folder),), nprocs=2)
    return torch.load(folder / "gradients.pt", weights_only=True)


@pytest.mark.parametrize("family, kind", STEPS)
def test_two_processes_are_one(of_two_processes: Any, family: str, kind: str) -> None:
    """The terms always, the detectors' own losses where both processes have as many objects: see docs/families.md."""
    whole, shared = shared_step(family, kind), of_two_processes[family, kind]
    assert whole.keys() == shared.keys()
    largest = max(float(value.abs().max()) for value in whole.values())
    for name, value in whole.items():
        assert shared[name].sub(value).abs().max() < 1e-3 * value.abs().max() + 1e-5 * largest, name
