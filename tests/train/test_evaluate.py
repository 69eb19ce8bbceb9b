from __future__ import annotations

import contextlib
import io
import math

import pytest
import torch
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torch.utils.data import Subset

from tardkd.data import Scenes, build_loader
from tardkd.train.distributed import Processes
from tardkd.train.evaluate import METRICS, EvaluationError, detections_to_coco, evaluate
from tardkd.train.models import ModelSpec, build_model

from .recipe import MODEL


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return Scenes(12, 128, seed=0)


class Oracle(nn.Module):
    """Answers with the ground truth of the images in order, changed by ``change(output, rank)``."""

    def __init__(self, dataset: Scenes, change=lambda output, rank: output) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.dataset, self.change, self.next = dataset, change, 0

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        assert not self.training and not torch.is_grad_enabled()
        outputs = []
        for _ in images:
            truth = self.dataset._target(self.next)
            output = {"boxes": truth["boxes"], "labels": truth["labels"], "scores": torch.ones(len(truth["labels"]))}
            outputs.append(self.change(output, self.next))
            self.next += 1
        return outputs


def batches(dataset):
    return build_loader(dataset, batch_size=5, shuffle=False, seed=0, epoch=0)


def none(output, rank):
    return {key: value[:0] for key, value in output.items()}


def test_perfect_detections(scenes, capsys):
    model = Oracle(scenes).train()
    metrics = evaluate(model, batches(scenes), scenes)
    assert list(metrics) == [*METRICS, "per_class"]
    assert metrics["AP"] == metrics["AP50"] == metrics["APs"] == pytest.approx(100)
    assert metrics["APl"] is None  # no object of these images is so large
    assert list(metrics["per_class"]) == scenes.class_names
    assert model.training and capsys.readouterr().out == ""


def test_no_detections_at_all(scenes):
    metrics = evaluate(Oracle(scenes, none), batches(scenes), scenes)
    assert metrics["AP"] == metrics["AP50"] == 0 and metrics["APl"] is None
    assert set(metrics["per_class"].values()) == {0}


def test_boxes_shifted_by_a_quarter(scenes):
    """IoU of a box with itself moved by a quarter of its width: 0.75 / 1.25 = 0.6, right up to threshold 0.6."""

    def shift(output, rank):
        boxes = output["boxes"].clone()
        boxes[:, 0::2] += 0.2499 * (boxes[:, 2:3] - boxes[:, 0:1])
        return {**output, "boxes": boxes}

    metrics = evaluate(Oracle(scenes, shift), batches(scenes), scenes)
    # Neighbours of the same class could meet a shifted box, too, which these scenes hardly have.
    assert metrics["AP50"] > 99 and metrics["AP75"] < 1
    assert metrics["AP"] == pytest.approx(30, abs=1)


def test_one_class_wrong(scenes):
    def rename(output, rank):
        return {**output, "labels": torch.where(output["labels"] == 2, 1, output["labels"])}

    per_class = evaluate(Oracle(scenes, rename), batches(scenes), scenes)["per_class"]
    assert per_class["ball"] == 0 and per_class["target"] < 100 and per_class["board"] == pytest.approx(100)


def test_only_the_loaders_images_count(scenes):
    part = torch.utils.data.Subset(scenes, range(4))
    assert evaluate(Oracle(scenes), batches(part), scenes)["AP"] == pytest.approx(100)


def test_agrees_with_pycocotools_own_way(scenes):
    """loadRes and summarize, as everyone runs them, on noisy detections."""
    generator = torch.Generator().manual_seed(0)

    def noise(output, rank):
        boxes, scores = output["boxes"], torch.rand(len(output["boxes"]), generator=generator)
        moved = boxes + torch.randn(boxes.shape, generator=generator) * 3
        moved[:, 2:] = torch.maximum(moved[:, 2:], moved[:, :2] + 1)
        return {"boxes": moved, "labels": output["labels"], "scores": scores}

    outputs = [noise(scenes._target(i), i) for i in range(len(scenes))]
    metrics = evaluate(Oracle(scenes, lambda _, rank: outputs[rank]), batches(scenes), scenes)
    results = detections_to_coco(outputs, range(1, 13), scenes.category_ids)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(scenes.coco, scenes.coco.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    expected = [None if value < 0 else 100 * value for value in evaluation.stats[:6]]
    assert [metrics[name] for name in METRICS] == pytest.approx(expected)
    assert 5 < metrics["AP"] < 95


def test_detections_to_coco():
    output = {"boxes": torch.tensor([[1.0, 2, 4, 8]]), "labels": torch.tensor([2]), "scores": torch.tensor([0.5])}
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
    assert detections_to_coco([empty, output], [4, 9], [17, 90]) == [
        {"image_id": 9, "category_id": 90, "bbox": [1, 2, 3, 6], "score": 0.5}
    ]


def test_detections_that_are_not_finite_name_the_image(scenes):
    def spoil(output, rank):
        return {**output, "scores": output["scores"] * (float("nan") if rank == 6 else 1)}

    model = Oracle(scenes, spoil).train()
    with pytest.raises(RuntimeError, match="image 7 are not finite"):
        evaluate(model, batches(scenes), scenes)
    assert model.training


def small_model(dataset) -> nn.Module:
    torch.manual_seed(0)
    return build_model(ModelSpec(**MODEL), len(dataset.class_names))


def test_weights_that_are_not_finite_have_no_precision(scenes):
    """Such a detector drops all of its boxes: AP 0.0 would look like a model that has learned nothing."""
    model = small_model(scenes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    with pytest.raises(EvaluationError, match=r"the model to be evaluated: \d+ of \d+ tensors hold NaN or infinity: "):
        evaluate(model, batches(scenes), scenes)


@pytest.mark.parametrize("part", ["rpn.head.cls_logits", "roi_heads.box_predictor.cls_score"])
def test_outputs_that_are_not_finite_have_no_precision(scenes, part):
    """The weights are finite here, but so large that what comes out is not."""
    model = small_model(scenes)
    with torch.no_grad():
        model.get_submodule(part).weight.fill_(3e38)
    with pytest.raises(EvaluationError, match="outputs on images 1, 2, 3, 4, 5 are not finite"):
        evaluate(model, batches(scenes), scenes)
    assert not any(module._forward_hooks for module in model.modules())


class Shares(Processes):
    """The first of two processes; what the other one has is given."""

    def __init__(self, other) -> None:
        super().__init__(count=2)
        object.__setattr__(self, "other", other)

    def gather(self, value):
        return [value, self.other]

    def from_first(self, value):
        return value


def test_an_image_that_two_processes_saw_counts_once(scenes):
    """Doubled detections would be wrong ones: the second on an object is."""

    def wrong_in_the_first_half(output, rank):
        return none(output, rank) if rank < 6 else output

    whole = evaluate(Oracle(scenes, wrong_in_the_first_half), batches(scenes), scenes)
    found = []  # what a process gathers
    listen = Shares(None)
    object.__setattr__(listen, "gather", lambda value: found.append(value) or [value])
    evaluate(Oracle(scenes, wrong_in_the_first_half), batches(scenes), scenes, listen)
    (results, seen) = found[0]
    late = [image_id for image_id in seen if image_id > 4]
    other = ([one for one in results if one["image_id"] in late], late)  # the first sees all, the other from 5 on
    assert evaluate(Oracle(scenes, wrong_in_the_first_half), batches(scenes), scenes, Shares(other)) == whole
    halves = Subset(scenes, range(4))
    loader = build_loader(halves, batch_size=5, shuffle=False, seed=0, epoch=0)
    assert evaluate(Oracle(scenes, wrong_in_the_first_half), loader, scenes, Shares(other)) == whole
