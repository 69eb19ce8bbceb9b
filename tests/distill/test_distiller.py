"""The distiller: what it trains, what it leaves alone, and what reaches whom."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed
from detectors.tiny import FAMILIES, tiny_batch, tiny_detector
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tardkd import ops
from tardkd.distill import Distiller, DistillSettings, ScheduleSettings

OPEN = {"feature_gate": "foreground", "classification_gate": "foreground", "regression_gate": "foreground"}
TERMS = ["distill_feature", "distill_classification", "distill_regression"]


def distilled(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in losses.items() if name.startswith("distill_")}


def run(distiller: nn.Module, family: str = "faster", seed: int = 5, **batch: Any) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return distiller(*tiny_batch(family, **batch))


def pair(teacher: dict[str, Any] | None = None, **settings: Any) -> Distiller:
    teacher = {"seed": 1, **(teacher or {})}
    return Distiller(tiny_detector(), tiny_detector(**teacher), DistillSettings(**{**OPEN, **settings}))


# --- losses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sharing", ["student", "teacher", "both"])
def test_terms_come_beside_the_detectors_losses(family: str, sharing: str) -> None:
    student = tiny_detector(family)
    plain = run(copy.deepcopy(student), family)
    settings = DistillSettings(**OPEN, sharing=sharing, gaussian=0.5)
    distiller = Distiller(student, tiny_detector(family, seed=1), settings)
    losses = run(distiller, family)
    assert list(losses) == [*plain, *TERMS, "distill_gaussian"]
    assert all(torch.equal(losses[name], plain[name]) for name in plain)
    assert all(value > 0 and value.requires_grad for value in distilled(losses).values())
    sum(losses.values()).backward()


def test_terms_without_weight_are_left_out() -> None:
    assert list(distilled(run(pair(classification=0.0)))) == ["distill_feature", "distill_regression"]
    assert list(distilled(run(pair(feature=0.0, regression=0.0)))) == ["distill_classification"]
    only = pair(feature=0.0, classification=0.0, regression=0.0, gaussian=1.0)
    assert list(distilled(run(only))) == ["distill_gaussian"]
    assert set(only.stats) == {"lambda"}


def test_weights_and_lambda_multiply() -> None:
    one = distilled(run(pair(gaussian=1.0)))
    weights = {"feature": 2.0, "classification": 3.0, "regression": 0.5, "gaussian": 4.0}
    distiller = pair(**weights)
    distiller.start(4, 10)
    distiller.set_progress(1, 0)
    assert distiller.weight == 0.75
    for name, value in distilled(run(distiller)).items():
        torch.testing.assert_close(value, 0.75 * weights[name.removeprefix("distill_")] * one[name])
    assert distiller.stats["lambda"] == 0.75


def test_values_are_the_ops_on_both_models_own_regions() -> None:
    """Assembled by hand from the two models' parts, on the regions the student sampled."""
    gates = {"classification_gate": "teacher_better", "regression_gate": "vs_student"}
    distiller = pair(feature_gate="either", balance="none", feature_norm="none", **gates)
    student, teacher = distiller.student, distiller.teacher
    seen: dict[str, Any] = {}
    heads = student.roi_heads
    original = heads.select_training_samples

    def sample(*args: Any) -> Any:
        result = original(*args)
        seen["proposals"], seen["labels"] = result[0], torch.cat(result[2])
        seen["gt"] = torch.cat([t["boxes"][i] for t, i in zip(args[1], result[1])])
        return result

    heads.select_training_samples = sample
    losses = run(distiller)
    with torch.no_grad():
        batch, _ = student.transform(*tiny_batch())
        outputs = []
        for model in (student, teacher):
            maps = model.backbone(batch.tensors)
            pooled = model.roi_heads.box_roi_pool(maps, seen["proposals"], batch.image_sizes)
            outputs.append((pooled, *model.roi_heads.box_predictor(model.roi_heads.box_head(pooled))))
    (pool_s, logits_s, deltas_s), (pool_t, logits_t, deltas_t) = outputs
    expected = ops.pooled_distill_loss(
        pool_s,
        pool_t,
        seen["proposals"],
        logits_s,
        logits_t,
        deltas_s,
        deltas_t,
        seen["labels"],
        seen["gt"],
        **gates,
    )
    for name in ("feature", "classification", "regression"):
        torch.testing.assert_close(losses[f"distill_{name}"], getattr(expected, name))
    foreground = seen["labels"] > 0
    assert distiller.stats["foreground"] == foreground.sum()
    assert 0 < expected.gates.sum() < 3 * foreground.sum()
    for name, column in zip(("feature", "classification", "regression"), expected.gates.T):
        torch.testing.assert_close(distiller.stats[f"gate_{name}"], column[foreground].float().mean())
    scores = ("teacher_score", "student_score", "teacher_iou", "other_iou")
    for name, column in zip(scores, expected.scores.T):
        torch.testing.assert_close(distiller.stats[name], column[foreground].mean())


OPS = [("pooled", "pooled_distill_loss"), ("pyramid", "region_distill_loss")]


@pytest.mark.parametrize("path, name", OPS)
def test_settings_reach_the_ops(path: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def watch(name: str) -> None:
        original = getattr(ops, name)

        def op(*args: Any, **options: Any) -> Any:
            seen.update(options)
            return original(*args, **options)

        monkeypatch.setattr(ops, name, op)

    watch(name)
    watch("gaussian_feature_loss")
    chosen = {
        "feature_loss": "absolute",
        "bin_weight": "gaussian",
        "feature_gate": "classification",
        "classification_gate": "foreground",
        "regression_gate": "vs_student",
        "temperature": 2.0,
        "beta": 0.5,
        "sigma_squared": 3.0,
    }
    weights = (1.0, 2.0, 3.0, 4.0)
    student, teacher = (tiny_detector(seed=seed, bbox_reg_weights=weights) for seed in (0, 1))
    run(Distiller(student, teacher, DistillSettings(path=path, gaussian=1.0, **chosen)))
    assert {key: seen[key] for key in chosen} == chosen
    assert (seen["box_weights"], seen["background"], seen["activation"]) == (weights, "first", "softmax")


def test_input_ratio() -> None:
    assert pair({"size": 96})._teachers[0].ratio == 1.5
    distiller = pair({"size": 96}, teacher_input_ratio=0.5)
    seen: list[tuple[int, ...]] = []
    distiller.teacher.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[-2:]))
    run(distiller)
    assert seen == [(64, 64)]  # 64x80 and 72x64, halved and padded


@pytest.mark.parametrize("teacher", [{}, {"channels": 12, "levels": 3}, {"size": 96}])
def test_both_paths_agree(teacher: dict[str, Any]) -> None:
    # Standardised, one side counts what the heads have pooled and the other the maps.
    pooled, pyramid = (pair(teacher=teacher, path=path, feature_norm="none") for path in ("pooled", "pyramid"))
    pyramid.load_task_state(pooled.task_state())
    if pooled.adapters["feature"].state_dict():
        # A constant survives pooling only inside the map: keep the comparison to what is linear.
        for distiller in (pooled, pyramid):
            nn.init.zeros_(distiller.adapters["feature"].bias)
    first, second = run(pooled), run(pyramid)
    for name in TERMS:
        torch.testing.assert_close(first[name], second[name])
    sum(distilled(first).values()).backward()
    sum(distilled(second).values()).backward()
    for (name, a), b in zip(pooled.student.named_parameters(), pyramid.student.parameters()):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


@pytest.mark.parametrize(
    "teacher",
    [
        {"channels": 12},
        {"levels": 3},
        {"first": 1},
        {"size": 96},
        {"size": 32},
        {"output_size": 5},
        {"sampling_ratio": 1},
        {"image_mean": [0.0, 0.0, 0.0]},
        {"channels": 6, "levels": 3, "first": 1, "size": 96, "output_size": 5},
    ],
    ids=lambda options: "-".join(options),
)
def test_unlike_teachers(teacher: dict[str, Any]) -> None:
    distiller = pair(teacher=teacher)
    losses = run(distiller)
    sum(distilled(losses).values()).backward()
    assert all(0 < value < 100 for value in distilled(losses).values())
    assert distiller.student.backbone.body[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("path", ["pooled", "pyramid"])
@pytest.mark.parametrize("sharing", ["student", "teacher", "both"])
def test_a_copy_has_nothing_to_teach(path: str, sharing: str) -> None:
    student = tiny_detector()
    settings = DistillSettings(**OPEN, path=path, sharing=sharing, gaussian=1.0)
    distiller = Distiller(student, copy.deepcopy(student), settings)
    losses = distilled(run(distiller))
    # As far as float32 tells p log(p / q) from zero: the two models' regions are pooled by two implementations. The
    # balance makes up to ten times as much of it.
    assert all(value.abs() < 1e-7 for value in losses.values())
    sum(losses.values()).backward()
    for name, parameter in student.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.abs().max() < 1e-5, name


def test_both_is_the_union() -> None:
    counts = {}
    for sharing in ("student", "teacher", "both"):
        distiller = pair(sharing=sharing)
        run(distiller)
        counts[sharing] = int(distiller.stats["foreground"])
    assert counts["both"] == counts["student"] + counts["teacher"]


def test_box_coders_may_differ() -> None:
    """The same predicted boxes, written in other units, are the same predictions."""
    student = tiny_detector()
    teacher = copy.deepcopy(student)
    weights = (1.0, 2.0, 4.0, 8.0)
    teacher.roi_heads.box_coder.weights = weights
    factor = (torch.tensor(weights) / torch.tensor([10.0, 10.0, 5.0, 5.0])).repeat(4)
    with torch.no_grad():
        teacher.roi_heads.box_predictor.bbox_pred.weight *= factor[:, None]
        teacher.roi_heads.box_predictor.bbox_pred.bias *= factor
    settings = DistillSettings(**OPEN, balance="none")
    assert run(Distiller(student, teacher, settings))["distill_regression"] < 1e-10


@pytest.mark.parametrize("sharing", ["student", "teacher", "both"])
@pytest.mark.parametrize("path", ["pooled", "pyramid"])
def test_foreground_alone_is_enough(sharing: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gates = {"classification_gate": "teacher_better", "regression_gate": "vs_student"}
    distiller = pair(sharing=sharing, path=path, feature_gate="either", feature_norm="none", **gates)
    first = run(distiller)
    stats = dict(distiller.stats)
    monkeypatch.setattr(DistillSettings, "foreground_only", False)
    second = run(distiller)
    for name in TERMS:
        torch.testing.assert_close(first[name], second[name])
    for name, value in distiller.stats.items():
        torch.testing.assert_close(stats[name], value)


def test_background_counts_where_a_gate_is_all() -> None:
    rows: list[int] = []
    for gates in ({}, {"feature_gate": "all"}, {"classification_gate": "all"}):
        distiller = pair(**gates)
        box_head = distiller.teacher.roi_heads.box_head
        box_head.register_forward_hook(lambda module, args, output: rows.append(len(output)))
        run(distiller)
        assert rows[-1] == (32 if gates else distiller.stats["foreground"])


@pytest.mark.parametrize("path", ["pooled", "pyramid"])
@pytest.mark.parametrize("channels", [8, 12])
def test_no_foreground(path: str, channels: int) -> None:
    distiller = pair(teacher={"channels": channels}, path=path, gaussian=1.0)
    images, targets = tiny_batch()
    nothing = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)} for _ in targets]
    losses = distiller(images, nothing)
    assert all(value == 0 for value in distilled(losses).values())
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in distiller.parameters())
    assert distiller.stats["foreground"] == 0 and distiller.stats["gate_feature"] == 0


def test_autocast() -> None:
    distiller = pair(teacher={"channels": 12}, gaussian=1.0)
    exact = distilled(run(distiller))
    with torch.autocast("cpu", torch.bfloat16):
        losses = run(distiller)
    for name, value in distilled(losses).items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, exact[name], rtol=0.2, atol=1e-3)
    sum(losses.values()).backward()


# --- the student is left alone -----------------------------------------------------------------------------


def train(model: nn.Module, steps: int = 3) -> tuple[list[dict[str, Tensor]], Tensor]:
    """SGD over the losses; every step's losses and the random state at the end."""
    torch.manual_seed(7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    history = []
    for step in range(steps):
        losses = model(*tiny_batch(seed=step))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        history.append({name: value.detach() for name, value in losses.items()})
    return history, torch.get_rng_state()


@pytest.mark.parametrize("with_teacher", [False, True])
def test_disabled_is_the_plain_baseline_bit_for_bit(with_teacher: bool) -> None:
    plain = tiny_detector()
    student = copy.deepcopy(plain)
    teacher = tiny_detector(seed=1, channels=12) if with_teacher else None
    distiller = Distiller(student, teacher, enabled=False)
    expected, random_state = train(plain)
    actual, its_random_state = train(distiller)
    assert actual == expected
    assert torch.equal(its_random_state, random_state)
    assert list(distiller.state_dict()) == [f"student.{name}" for name in plain.state_dict()]
    for (name, a), b in zip(plain.state_dict().items(), student.state_dict().values()):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("channels", [8, 12])
def test_distilling_draws_no_random_numbers(channels: int) -> None:
    """Same seed, same sampled proposals as the baseline: the two stay comparable step by step."""
    plain = tiny_detector()
    teacher = tiny_detector(seed=1, channels=channels, size=96)
    student = copy.deepcopy(plain)
    torch.manual_seed(11)
    expected = plain(*tiny_batch())
    random_state = torch.get_rng_state()
    torch.manual_seed(11)
    losses = Distiller(student, teacher)(*tiny_batch())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(losses[name], expected[name]) for name in expected)


def test_eval_is_the_student() -> None:
    distiller = pair()
    run(distiller)
    distiller.eval()
    images, _ = tiny_batch()
    for a, b in zip(distiller(images), distiller.student(images)):
        assert all(torch.equal(a[key], b[key]) for key in b)
    assert not any(len(module._forward_hooks) for module in distiller.modules())


# --- the teacher -------------------------------------------------------------------------------------------


def count_calls(monkeypatch: pytest.MonkeyPatch, model: nn.Module, names: list[str]) -> dict[str, int]:
    calls = dict.fromkeys(names, 0)

    def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return original(*args, **kwargs)

        return call

    for name in names:
        owner, _, attribute = name.rpartition(".")
        owner = model.get_submodule(owner)
        monkeypatch.setattr(owner, attribute, counted(name, getattr(owner, attribute)))
    return calls


PARTS = [
    "forward",
    "transform.forward",
    "backbone.forward",
    "rpn.forward",
    "rpn.head.forward",
    "rpn.filter_proposals",
    "rpn.compute_loss",
    "roi_heads.forward",
    "roi_heads.select_training_samples",
    "roi_heads.assign_targets_to_proposals",
    "roi_heads.postprocess_detections",
    "roi_heads.box_head.forward",
    "roi_heads.box_predictor.forward",
]
PROPOSES = {"rpn.forward": 1, "rpn.head.forward": 1, "rpn.filter_proposals": 1}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sharing, proposes", [("student", {}), ("teacher", PROPOSES), ("both", PROPOSES)])
def test_what_of_the_teacher_runs(
    family: str, sharing: str, proposes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    distiller = Distiller(
        tiny_detector(family), tiny_detector(family, seed=1), DistillSettings(**OPEN, sharing=sharing)
    )
    calls = count_calls(monkeypatch, distiller.teacher, PARTS)
    run(distiller, family)
    ran = {"backbone.forward": 1, "roi_heads.box_head.forward": 1, "roi_heads.box_predictor.forward": 1}
    assert calls == {**dict.fromkeys(PARTS, 0), **ran, **proposes}


@pytest.mark.parametrize("sharing, runs", [("student", 1), ("teacher", 2), ("both", 2)])
def test_what_of_the_student_runs(sharing: str, runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    distiller = pair(sharing=sharing)
    calls = count_calls(monkeypatch, distiller.student, PARTS)
    run(distiller)
    assert calls["forward"] == calls["backbone.forward"] == calls["rpn.forward"] == 1
    assert calls["roi_heads.box_head.forward"] == calls["roi_heads.assign_targets_to_proposals"] == runs


def test_the_teacher_starts_before_the_students_trunk() -> None:
    """So that on a GPU the two trunks run beside each other."""
    distiller = pair()
    order: list[str] = []
    for name, model in (("student", distiller.student), ("teacher", distiller.teacher)):
        model.backbone.register_forward_pre_hook(lambda module, args, name=name: order.append(name))
    run(distiller)
    assert order == ["teacher", "student"]


def test_teacher_in_bf16() -> None:
    distiller = pair(teacher_bf16=True)
    dtypes: set[torch.dtype] = set()
    distiller.teacher.backbone.register_forward_hook(
        lambda module, args, maps: dtypes.update(level.dtype for level in maps.values())
    )
    distiller.teacher.roi_heads.box_predictor.register_forward_hook(
        lambda module, args, outputs: dtypes.update(output.dtype for output in outputs)
    )
    losses, exact = run(distiller), run(pair())
    assert dtypes == {torch.bfloat16, torch.float32}  # the maps, and what the head says
    for name, value in distilled(losses).items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, exact[name], rtol=0.1, atol=1e-3)


def test_nothing_of_the_teacher_runs_after_the_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tiny_detector()
    distiller = Distiller(
        copy.deepcopy(plain),
        tiny_detector(seed=1, channels=12),
        DistillSettings(schedule=ScheduleSettings(stop=0.5)),
    )
    distiller.start(2, 1)
    distiller.set_progress(1, 0)
    calls = count_calls(monkeypatch, distiller.teacher, PARTS)
    losses, expected = run(distiller), run(plain)
    assert not any(calls.values())
    assert list(losses) == [*expected, *TERMS]
    assert all(torch.equal(losses[name], expected[name]) for name in expected)
    assert all(value == 0 for value in distilled(losses).values())
    assert {name: float(value) for name, value in distiller.stats.items()} == {"lambda": 0.0}
    sum(losses.values()).backward()
    assert all((parameter.grad == 0).all() for parameter in distiller.adapters.parameters())


def test_teacher_is_frozen_and_stays_so() -> None:
    distiller = pair()
    teacher = distiller.teacher
    before = copy.deepcopy(teacher.state_dict())
    distiller.train()
    assert not any(module.training for module in teacher.modules())
    teacher.train()  # as an evaluation that ends with model.train() would
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
    sum(run(distiller).values()).backward()
    optimizer.step()
    assert not any(module.training for module in teacher.modules())
    assert all(not p.requires_grad and p.grad is None for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_teacher_is_no_part_of_the_module() -> None:
    distiller = pair(teacher={"channels": 12})
    student = [f"student.{name}" for name in distiller.student.state_dict()]
    assert list(distiller.state_dict()) == [*student, "adapters.feature.weight", "adapters.feature.bias"]
    theirs = {id(parameter) for parameter in distiller.teacher.parameters()}
    assert not theirs & {id(parameter) for parameter in distiller.parameters()}
    assert distiller.teacher not in list(distiller.modules())


def test_teacher_follows_the_student() -> None:
    distiller = pair(teacher={"channels": 12}).to("meta")
    assert next(distiller.teacher.parameters()).device.type == "cpu"
    distiller._teachers[0].ready(torch.device("meta"))
    assert next(distiller.teacher.parameters()).device.type == "meta"


def test_double_precision() -> None:
    student, teacher = tiny_detector().double(), tiny_detector(seed=1).double()
    images, targets = tiny_batch()
    images = [image.double() for image in images]
    targets = [{**target, "boxes": target["boxes"].double()} for target in targets]
    losses = Distiller(student, teacher, DistillSettings(**OPEN))(images, targets)
    assert all(losses[name].dtype == torch.float64 and losses[name] > 0 for name in TERMS)


# --- gradients and adapters --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["pooled", "pyramid"])
def test_who_learns_from_which_term(path: str) -> None:
    def reached(**weights: float) -> set[str]:
        distiller = pair(teacher={"channels": 12}, path=path, **weights)
        sum(distilled(run(distiller)).values()).backward()
        return {
            name
            for name, part in (
                ("backbone", distiller.student.backbone.body),
                ("fpn", distiller.student.backbone.fpn),
                ("rpn", distiller.student.rpn),
                ("box_head", distiller.student.roi_heads.box_head),
                ("cls", distiller.student.roi_heads.box_predictor.cls_score),
                ("box", distiller.student.roi_heads.box_predictor.bbox_pred),
                ("adapters", distiller.adapters),
            )
            if any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
        }

    off = {"feature": 0.0, "classification": 0.0, "regression": 0.0}
    trunk = {"backbone", "fpn"}
    assert reached(**{**off, "feature": 1.0}) == trunk | {"adapters"}
    assert reached(**{**off, "gaussian": 1.0}) == trunk | {"adapters"}
    assert reached(**{**off, "classification": 1.0}) == trunk | {"box_head", "cls"}
    assert reached(**{**off, "regression": 1.0}) == trunk | {"box_head", "box"}


def test_adapters_are_made_where_channels_differ_and_features_count() -> None:
    assert pair(teacher={"channels": 12}).adapters["feature"].weight.shape == (12, 8, 1, 1)
    assert not list(pair().adapters.parameters())
    assert not list(pair(teacher={"channels": 12}, feature=0.0).adapters.parameters())
    assert list(pair(teacher={"channels": 12}, feature=0.0, gaussian=1.0).adapters.parameters())


def test_adapters_have_the_students_dtype() -> None:
    student, teacher = tiny_detector().double(), tiny_detector(seed=1, channels=12)
    assert Distiller(student, teacher).adapters["feature"].weight.dtype == torch.float64


def test_task_state() -> None:
    source, other = pair(teacher={"channels": 12}), pair(teacher={"channels": 12, "seed": 2})
    source.start(4, 2)
    source.set_progress(2, 1)
    other.load_task_state(source.task_state())
    assert torch.equal(other.adapters["feature"].weight, source.adapters["feature"].weight)
    assert other.weight == source.weight == 0.5


# --- distributed -------------------------------------------------------------------------------------------


@pytest.fixture
def process_group(tmp_path: Any) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("sharing", ["student", "both"])
def test_ddp_without_unused_parameters(sharing: str, process_group: None) -> None:
    """Steps with regions, without foreground, and after the stop: DDP would refuse the step after a gap."""
    schedule = ScheduleSettings(stop=0.5)
    distiller = pair(teacher={"channels": 12}, sharing=sharing, schedule=schedule, gaussian=1.0)
    distiller.start(2, 2)
    wrapped = DistributedDataParallel(distiller, find_unused_parameters=False)
    assert not any("teacher" in name for name, _ in wrapped.named_parameters())
    images, targets = tiny_batch()
    nothing = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)} for _ in targets]
    for epoch, step, truth in ((0, 0, targets), (0, 1, nothing), (1, 0, targets), (1, 1, nothing)):
        distiller.set_progress(epoch, step)
        wrapped.zero_grad()
        sum(wrapped(images, truth).values()).backward()
        assert all(parameter.grad is not None for parameter in distiller.parameters())


@pytest.mark.parametrize("path", ["pooled", "pyramid"])
def test_standardised_features_do_not_hang_on_the_teachers_scale(path: str) -> None:
    values = {}
    for norm in ("none", "channel"):
        for factor in (1.0, 10.0):
            distiller = pair(feature_norm=norm, path=path, check_finite=False)
            assert distiller.teacher is not None
            distiller.teacher.backbone.register_forward_hook(
                lambda module, args, maps, factor=factor: {name: factor * level for name, level in maps.items()}
            )
            values[norm, factor] = run(distiller)["distill_feature"].item()
    assert values["channel", 10.0] == pytest.approx(values["channel", 1.0], rel=1e-2)  # an epsilon is in the variances
    assert values["none", 10.0] > 5 * values["none", 1.0]
