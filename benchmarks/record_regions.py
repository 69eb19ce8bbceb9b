"""Records the regions of a training that has been interrupted, or has ended: what `workloads.training` is made of.

    python benchmarks/record_regions.py CHECKPOINT benchmarks/regions.npz --batches 4 data.root=PATH

CHECKPOINT is the ``last.pt`` of a distilled run. Its student goes on with a few batches of 512 regions an image,
without learning; the overrides are those of ``tardkd train``. Boxes are stored as shares of the image's sides, so that
they fit an image of any size; deltas and scores do not change with it.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from tardkd.data.loader import build_loader
from tardkd.detectors import for_model
from tardkd.detectors.base import Batch
from tardkd.distill.sharing import share_regions
from tardkd.train import checkpoint
from tardkd.train.build import build_dataset, load_student, load_teacher, stored_config

REGIONS = 512  # an image
AS_ON_COCO = [
    f"student.box_batch_size_per_image={REGIONS}",
    "student.rpn_pre_nms_top_n_train=2000",
    "student.rpn_post_nms_top_n_train=2000",
    "distill.feature_gate=all",  # the teacher's head runs on the background too
]


def record(path: str, batches: int, overrides: list[str]) -> dict[str, np.ndarray]:
    state = checkpoint.load(path)
    config = stored_config(state, path, [*AS_ON_COCO, *overrides])
    state["config"] = config.plain()
    student = for_model(load_student(state, path).train())
    teacher = for_model(load_teacher(config.teacher, state["classes"])[0].eval())
    loader = build_loader(build_dataset(config, "train"), batch_size=2, shuffle=True, seed=0, epoch=0)
    rows = []
    for (images, targets), _ in zip(loader, range(batches)):
        with torch.no_grad():
            ours = student.student_pass(Batch(images, targets))
            theirs = teacher.teacher_pass(images, ours.inputs, teacher.input_size / student.input_size)
            regions = share_regions(student, ours, [(teacher, theirs)], config.distill)
            head = teacher.answers(theirs, regions, regions.labels - 1)
        sides = [torch.tensor([width, height, width, height]) for height, width in ours.inputs.sizes]
        sides = torch.cat([side.expand(count, 4) for side, count in zip(sides, regions.counts)])
        every = torch.arange(len(regions.labels))

        def of_the_label(deltas: torch.Tensor) -> torch.Tensor:
            return deltas.unflatten(1, (-1, 4))[every, regions.labels]

        rows.append(
            {
                "counts": torch.tensor(regions.counts),
                "proposals": torch.cat(regions.proposals) / sides,
                "gt_boxes": regions.gt_boxes / sides,
                "labels": regions.labels,
                "student_scores": regions.head.logits.softmax(1)[every, regions.labels],
                "teacher_scores": head.logits.softmax(1)[every, regions.labels],
                "student_deltas": of_the_label(regions.head.boxes),
                "teacher_deltas": of_the_label(head.boxes),
            }
        )
    return {key: torch.cat([row[key] for row in rows]).numpy() for key in rows[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("output")
    parser.add_argument("--batches", type=int, default=4, help="of two images")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    arrays = record(arguments.checkpoint, arguments.batches, arguments.overrides)
    np.savez_compressed(arguments.output, **arrays)
    foreground = (arrays["labels"] > 0).mean()
    print(f"{len(arrays['labels'])} regions of {len(arrays['counts'])} images, {foreground:.1%} foreground")


if __name__ == "__main__":
    main()
