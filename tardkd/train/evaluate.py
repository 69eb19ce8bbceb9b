"""COCO's average precision of a detector on a data set, by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import compress
from typing import Any, Protocol

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn

from tardkd.data import VocDetection, to_float
from tardkd.detectors import find
from tardkd.train.distributed import Processes
from tardkd.train.voc_metric import voc_ap50
from tardkd.weights import NonFiniteWeightsError, check_finite

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")  # in the order of COCOeval.stats


class EvaluationError(RuntimeError):
    """A model of which no average precision can be said; the message names the reason."""


class DetectionDataset(Protocol):
    """What evaluation needs to know of a data set: ground truth, and what its labels 1..K mean."""

    coco: COCO
    class_names: list[str]
    category_ids: list[int]


def evaluate(
    model: nn.Module, loader: Iterable, dataset: DetectionDataset, processes: Processes | None = None
) -> dict[str, Any]:
    """Run ``model`` over ``loader`` and compare its detections with the ground truth of ``dataset``.

    Returns ``AP`` (mean over IoU 0.50:0.05:0.95), ``AP50``, ``AP75``, and ``APs``, ``APm``, ``APl`` (objects under
    32^2, up to 96^2, and over 96^2 pixels of area), all in percent and at most 100 detections per image, and
    ``per_class``: name -> AP; of a VOC folder also ``VOC_AP50``, see :func:`voc_ap50`. A metric without ground truth
    is None. Only the images of ``loader`` count, of several processes those of all their loaders, each once. The model
    comes back in the mode it was in.

    Raises:
        EvaluationError: a weight, an output of the model's heads or a detection is not finite. A detector drops boxes
            with such numbers without a word, so that its precision would look as if it had found nothing.
    """
    try:
        check_finite(model.state_dict(), "the model to be evaluated")
    except NonFiniteWeightsError as error:
        raise EvaluationError(str(error)) from None
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    detector = find(model)  # None: a module that is called with images, such as a wrapper of one's own
    detect = model if detector is None else detector.detect
    results: list[dict[str, Any]] = []
    image_ids: list[int] = []
    try:
        with torch.inference_mode(), _watched(() if detector is None else detector.heads) as finite:
            for images, targets in loader:
                of_batch = [int(target["image_id"]) for target in targets]
                outputs = detect(to_float(images, device))
                if finite and not torch.stack(finite).all():
                    raise EvaluationError(
                        f"the model's outputs on images {', '.join(map(str, of_batch))} are not finite"
                    )
                finite.clear()
                readable = [not target.get("unreadable") for target in targets]  # the others are without detections
                results += detections_to_coco(
                    list(compress(outputs, readable)), list(compress(of_batch, readable)), dataset.category_ids
                )
                image_ids += of_batch
    finally:
        model.train(training)
    processes = processes or Processes()
    shares = processes.gather((results, image_ids))
    if not processes.is_first:
        return processes.from_first(None)
    # An image that several processes had counts once.
    chosen = {image_id: share for share in shares for image_id in share[1]}
    results = [result for share in shares for result in share[0] if chosen[result["image_id"]] is share]
    metrics = coco_metrics(results, list(chosen), dataset)
    if isinstance(dataset, VocDetection):
        metrics["VOC_AP50"] = voc_ap50(results, list(chosen), dataset)
    return processes.from_first(metrics)


@contextmanager
def _watched(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """A list that grows with every pass of the modules: for each of their outputs () bool, whether it is finite."""
    finite: list[Tensor] = []

    def note(module: nn.Module, inputs: Any, outputs: Any) -> None:
        if isinstance(outputs, Tensor):
            finite.append(outputs.isfinite().all())
        elif isinstance(outputs, Mapping):
            note(module, inputs, tuple(outputs.values()))
        else:
            for output in outputs:
                note(module, inputs, output)

    handles = [module.register_forward_hook(note) for module in modules]
    try:
        yield finite
    finally:
        for handle in handles:
            handle.remove()


def detections_to_coco(
    outputs: Sequence[dict[str, Tensor]], image_ids: Sequence[int], category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """A detector's outputs as COCO results ``{image_id, category_id, bbox [x, y, w, h], score}``.

    The outputs are one dict an image: boxes (D, 4) xyxy, labels (D,) 1..K and scores (D,).
    """
    results = []
    for output, image_id in zip(outputs, image_ids, strict=True):
        boxes, scores = output["boxes"].double().cpu(), output["scores"].double().cpu()
        if not (boxes.isfinite().all() and scores.isfinite().all()):
            raise EvaluationError(f"the model's detections on image {image_id} are not finite")
        corners_to_sizes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)
        for box, label, score in zip(
            corners_to_sizes.tolist(), output["labels"].tolist(), scores.tolist(), strict=True
        ):
            results.append({"image_id": image_id, "category_id": category_ids[label - 1], "bbox": box, "score": score})
    return results


def coco_metrics(results: list[dict[str, Any]], image_ids: Sequence[int], dataset: DetectionDataset) -> dict[str, Any]:
    """:func:`evaluate`'s numbers from COCO ``results`` on the images ``image_ids``."""
    # COCO.loadRes refuses an empty list, so the detections are indexed here.
    detections = COCO()
    detections.dataset = {
        "images": dataset.coco.dataset["images"],
        "categories": dataset.coco.dataset["categories"],
        "annotations": [
            {**result, "id": i, "area": result["bbox"][2] * result["bbox"][3], "iscrowd": 0}
            for i, result in enumerate(results, start=1)
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        detections.createIndex()
        evaluation = COCOeval(dataset.coco, detections, "bbox")
        evaluation.params.imgIds = sorted(set(image_ids))
        evaluation.params.catIds = list(dataset.category_ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (IoU, recall, class); -1 where there is no object
    per_class = {name: _percent(_mean(precision[:, :, k])) for k, name in enumerate(dataset.class_names)}
    return {**dict(zip(METRICS, map(_percent, evaluation.stats), strict=False)), "per_class": per_class}


def _mean(precision: np.ndarray) -> float:
    known = precision[precision > -1]
    return float(known.mean()) if known.size else -1.0


def _percent(value: float) -> float | None:
    return None if value < 0 else 100 * float(value)
