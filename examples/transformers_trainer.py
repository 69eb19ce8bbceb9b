"""A script for transformers' Trainer, and the lines that let a teacher help.

    python examples/transformers_trainer.py --depth 2 --out teacher                      # the script as it was
    python examples/transformers_trainer.py --depth 1 --out student --teacher teacher

Lines marked with (+) are what distillation adds, and (~) what it changes. The data are tardkd's built-in scenes and the
models begin with random weights, so that nothing has to be downloaded: this shows how to write the script, not what
distillation gains. `pip install ".[train,transformers]"` brings what it needs.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor
from transformers import (
    RTDetrResNetConfig,
    RTDetrV2Config,
    RTDetrV2ForObjectDetection,
    Trainer,
    TrainingArguments,
    set_seed,
)

from tardkd.data import Scenes, to_float
from tardkd.distill import Distiller  # (+)
from tardkd.distill.transformers import DistillTrainer  # (+)

SIZE = 96


def build(depth: int, classes: int) -> RTDetrV2ForObjectDetection:
    """A small RT-DETRv2; yours comes by from_pretrained."""
    widths = [32, 64, 128, 256]
    backbone = RTDetrResNetConfig(
        embedding_size=32, hidden_sizes=widths, depths=[depth] * 4, layer_type="basic", out_indices=[2, 3, 4]
    )
    return RTDetrV2ForObjectDetection(
        RTDetrV2Config(
            backbone_config=backbone,
            freeze_backbone_batch_norms=False,
            encoder_in_channels=widths[1:],
            encoder_hidden_dim=64,
            d_model=64,
            decoder_in_channels=[64] * 3,
            decoder_layers=2,
            num_queries=50,
            num_labels=classes,
        )
    )


def collate(items: list[tuple[Tensor, dict[str, Tensor]]]) -> dict[str, Any]:
    """Images and targets as the model takes them; an image processor does the same from pictures and annotations."""
    images, targets = zip(*items)
    labels = []
    for target in targets:
        low, high = target["boxes"][:, :2], target["boxes"][:, 2:]
        boxes = torch.cat([(low + high) / 2, high - low], dim=1) / SIZE
        labels.append({"class_labels": target["labels"] - 1, "boxes": boxes})
    return {"pixel_values": torch.stack(to_float(images)), "labels": labels}


def main() -> None:
    parser = argparse.ArgumentParser(description="a Trainer with a teacher")
    parser.add_argument("--depth", type=int, default=1, help="blocks of each stage of the model that is trained")
    parser.add_argument("--teacher", metavar="FOLDER", help="a model that was trained by this script")
    parser.add_argument("--out", default="student", help="where the model goes")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--images", type=int, default=400)
    args = parser.parse_args()

    set_seed(0)
    scenes = Scenes(args.images, SIZE, seed=0)
    model = build(args.depth, len(scenes.class_names))
    options = {
        "args": TrainingArguments(
            output_dir=f"{args.out}-checkpoints",
            max_steps=args.steps,
            per_device_train_batch_size=4,
            learning_rate=2e-4,
            max_grad_norm=0.1,
            logging_steps=max(1, args.steps // 10),
            remove_unused_columns=False,
            report_to=[],
        ),
        "train_dataset": scenes,
        "data_collator": collate,
    }
    if args.teacher:
        teacher = RTDetrV2ForObjectDetection.from_pretrained(args.teacher)  # (+)
        trainer = DistillTrainer(model=Distiller(model, teacher), **options)  # (~) was: Trainer(model=model, **options)
    else:
        trainer = Trainer(model=model, **options)
    trainer.train()
    trainer.save_model(args.out)  # plainly the model: no teacher, no adapters


if __name__ == "__main__":
    main()
