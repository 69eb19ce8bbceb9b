"""transformers' Trainer for a student with a teacher."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils.generic import find_labels

from tardkd.distill import Distiller

TASK_STATE = "distillation.pt"  # in a checkpoint, beside the student's own files


class DistillTrainer(Trainer):
    """A Trainer whose ``model`` is a Distiller of one of transformers' detectors.

    What DDP wraps is the distiller, so that gradients of student and adapters are averaged alike. What is saved is the
    student, for its ``from_pretrained`` to read; adapters and schedule lie beside it, for a training that is resumed.
    The schedule follows the steps by itself.
    """

    model: Any  # the distiller

    def __init__(self, model: Distiller, args: TrainingArguments | None = None, **options: Any) -> None:
        if not isinstance(model, Distiller):
            raise TypeError(f"model must be a Distiller around the model that trains, got {type(model).__name__}")
        super().__init__(model, args, **options)
        if self.args.label_names is None:  # which Trainer reads off the signature of the model's forward
            self.label_names = find_labels(type(model.student))
        self.add_callback(Progress(model))

    @contextmanager
    def _student_alone(self) -> Iterator[nn.Module]:
        """What Trainer does to ``self.model`` it does to the student."""
        distiller = self.model
        self.model = distiller.student
        try:
            yield self.model
        finally:
            self.model = distiller

    def _set_signature_columns_if_needed(self) -> None:
        with self._student_alone():
            super()._set_signature_columns_if_needed()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if state_dict is not None:
            mine = "student."
            state_dict = {key.removeprefix(mine): state_dict[key] for key in state_dict if key.startswith(mine)}
        with self._student_alone():
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            torch.save(self.model.task_state(), Path(output_dir or self.args.output_dir, TASK_STATE))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._load_student(resume_from_checkpoint)
        state = torch.load(Path(resume_from_checkpoint, TASK_STATE), map_location="cpu", weights_only=True)
        self.model.load_task_state(state)

    def _load_best_model(self) -> None:
        self._load_student(self.state.best_model_checkpoint)

    def _load_student(self, folder: str) -> None:
        """Fill the student from its files in a checkpoint.

        Their names may be those of an older release of the model, which ``from_pretrained`` knows, and what Trainer
        itself does here does not: it would leave these tensors as they are.
        """
        student = self.model.student
        loaded, report = type(student).from_pretrained(folder, output_loading_info=True)
        if report["missing_keys"]:
            raise ValueError(f"{folder} lacks tensors of the student: {', '.join(sorted(report['missing_keys']))}")
        student.load_state_dict(loaded.state_dict())


class Progress(TrainerCallback):
    """Tells a distiller's schedule where the training is, which counts epochs of equal length."""

    def __init__(self, distiller: Distiller) -> None:
        self.distiller = distiller
        self.steps_per_epoch = 1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        epochs = max(1, math.ceil(state.num_train_epochs))
        self.steps_per_epoch = max(1, math.ceil(state.max_steps / epochs))
        self.distiller.start(epochs, self.steps_per_epoch)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.distiller.set_progress(*divmod(state.global_step, self.steps_per_epoch))
