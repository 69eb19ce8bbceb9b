"""One run: a student trained by a method, its average precision on the validation split, and how it came about."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from tardkd.data import build_loader, to_float
from tardkd.data.seeds import mix
from tardkd.detectors.sampling import seed_samplers
from tardkd.train.config import Optimizer
from tardkd.train.evaluate import evaluate
from tardkd.train.optim import build_optimizer, learning_rate, set_learning_rate

from .balance import Balance
from .learners import Learner


@dataclass(frozen=True)
class Budget:
    """How long a model trains, and how fast it moves."""

    epochs: int
    lr: float
    batch: int
    evaluations: int = 3  # spread evenly over the training, the last at its end
    weight_decay: float = 0.05
    warmup: int = 50
    clip_norm: float = 10.0


def train(learner: Learner, balance: Balance | None, train_set: Any, val_set: Any, budget: Budget, seed: int) -> dict:
    """Train the learner's student in place; the curve of its precision, its time, and means of what happened.

    Order, views and choice of regions depend on the seed alone, so that two methods of one seed see the same.
    """
    settings = Optimizer(
        kind="adamw", lr=budget.lr, weight_decay=budget.weight_decay, warmup=budget.warmup, schedule="cosine"
    )
    optimizer = build_optimizer(settings, learner)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    samplers = seed_samplers(learner.student)
    per_epoch = len(train_set) // budget.batch
    learner.start(budget.epochs, per_epoch)
    learner.train()
    due = {round(budget.epochs * (part + 1) / budget.evaluations) for part in range(budget.evaluations)}
    curve: list[dict[str, Any]] = []
    history: list[dict[str, float]] = []
    seconds = cpu = 0.0
    for epoch in range(budget.epochs):
        means: dict[str, float] = defaultdict(float)
        wall_began, cpu_began = time.perf_counter(), time.process_time()
        loader = build_loader(train_set, batch_size=budget.batch, shuffle=True, seed=seed, epoch=epoch)
        for step, (images, targets) in enumerate(loader):
            number = epoch * per_epoch + step
            for sampler in samplers:
                sampler.seeds = [mix(seed, number, int(target["image_id"])) for target in targets]
            torch.manual_seed(mix(seed, number))
            learner.set_progress(epoch, step)
            student_pass, losses = learner.learn(to_float(images), targets)
            if balance is not None:
                losses = balance(losses, student_pass.features, learner.weight)
            optimizer.zero_grad(set_to_none=True)
            torch.stack(list(losses.values())).sum().backward()
            nn.utils.clip_grad_norm_(parameters, budget.clip_norm)
            set_learning_rate(optimizer, learning_rate(settings, number, per_epoch, budget.epochs))
            optimizer.step()
            for name, value in {**losses, **learner.stats}.items():
                means[name] += value.item() / per_epoch
        seconds += time.perf_counter() - wall_began
        cpu += time.process_time() - cpu_began
        history.append({name: round(value, 5) for name, value in means.items()})
        if epoch + 1 in due:
            loader = build_loader(val_set, batch_size=budget.batch, shuffle=False, seed=0, epoch=0)
            metrics = evaluate(learner.student, loader, val_set)
            curve.append({"epoch": epoch + 1, "cpu_seconds": round(cpu, 1), **metrics})
    return {
        "AP": curve[-1]["AP"],
        "curve": curve,
        "history": history,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "budget": asdict(budget),
        "pulls": balance.pulls() if balance else {},
        "factors": balance.factors if balance else {},
    }
