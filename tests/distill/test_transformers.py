"""transformers' Trainer with a distiller: three steps, plain checkpoints, and a training that goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from detectors.transformers.tiny import tiny_call, tiny_query_detector
from transformers import TrainingArguments

from tardkd.distill import Distiller
from tardkd.distill.transformers import DistillTrainer


class Images(torch.utils.data.Dataset):
    """Four images, each with its objects."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Any]:
        call = tiny_call(seed=index)
        return {"pixel_values": call["pixel_values"][0], "labels": call["labels"][0], "name": str(index)}


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "pixel_values": torch.stack([item["pixel_values"] for item in items]),
        "labels": [item["labels"] for item in items],
    }


def trainer(folder: Path, kind: str = "rt_detr", **options: Any) -> DistillTrainer:
    torch.manual_seed(0)
    distiller = Distiller(tiny_query_detector(kind), tiny_query_detector(kind, seed=1, channels=24))
    args = TrainingArguments(
        str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        save_steps=3,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=options.pop("remove_unused_columns", False),
        **options,
    )
    return DistillTrainer(
        model=distiller, args=args, train_dataset=Images(), eval_dataset=Images(), data_collator=collate
    )


@pytest.mark.parametrize("kind", ["rt_detr_v2", "d_fine"])
def test_it_trains_saves_and_goes_on(kind, tmp_path):
    whole = trainer(tmp_path / "a", kind)
    start = whole.model.adapters["feature"].weight.clone()
    lambdas = []
    forward = whole.model.forward

    def noting(*args: Any, **kwargs: Any) -> Any:
        lambdas.append(whole.model.weight)
        return forward(*args, **kwargs)

    whole.model.forward = noting
    whole.train()
    del whole.model.forward
    assert lambdas == [1.0, 1.0, 0.5, 0.5]  # linear: epochs of 2 steps
    assert whole.state.global_step == 4 and not torch.equal(whole.model.adapters["feature"].weight, start)

    # A checkpoint is plainly the student's.
    whole.save_model(str(tmp_path / "final"))
    final = type(whole.model.student).from_pretrained(tmp_path / "final").state_dict()
    assert all(torch.equal(final[name], value) for name, value in whole.model.student.state_dict().items())

    # A training that is resumed ends where the one that was not interrupted ends.
    again = trainer(tmp_path / "b", kind)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert again.state.global_step == 4 and again.model.weight == 0.5
    torch.testing.assert_close(again.model.state_dict(), whole.model.state_dict())


def test_it_evaluates_the_student_and_loads_the_best(tmp_path):
    one = trainer(tmp_path, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True, max_steps=3)
    one.train()
    best = type(one.model.student).from_pretrained(one.state.best_model_checkpoint)
    torch.testing.assert_close(best.state_dict(), one.model.student.state_dict())
    evaluated = [row["eval_loss"] for row in one.state.log_history if "eval_loss" in row]
    assert len(evaluated) == 1 and torch.isfinite(torch.tensor(evaluated)).all()


def test_columns_are_those_of_the_student(tmp_path):
    """Trainer drops what the model's forward does not name, here the name of an image."""
    one = trainer(tmp_path, remove_unused_columns=True)
    batch = next(iter(one.get_train_dataloader()))
    assert set(batch) == {"pixel_values", "labels"}


def test_a_model_that_is_no_distiller_is_an_error():
    with pytest.raises(TypeError, match="model must be a Distiller .* got RTDetrForObjectDetection"):
        DistillTrainer(tiny_query_detector())
