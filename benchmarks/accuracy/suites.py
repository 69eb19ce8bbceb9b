"""What is run: data sets, pairs of detectors, methods, and the suites that put them together. Rows to add to.

A pair or a method is known by its name, in results too: change what a name means and its results are wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from tardkd.distill import DistillSettings, ScheduleSettings
from tardkd.train.models import ModelSpec

from .data import DataSet
from .learners import Method
from .models import Geometry, Pretrained
from .train import Budget

DATA = {
    "bccd": DataSet(
        "bccd",
        Geometry(short=160, long=256, anchors=(8, 16, 32, 64, 128), canonical=80),
        augment={"flip": 0.5, "scale": (0.8, 1.25), "shift": 0.1},
        val="val",
        epochs=14,
    ),
    "cards": DataSet(
        "cards",
        Geometry(short=192, long=288, anchors=(16, 32, 64, 128, 256), canonical=112),
        augment={"flip": 0.5, "scale": (0.7, 1.3), "shift": 0.1},
        val=None,
        epochs=14,
    ),
    "deeppcb": DataSet(
        "deeppcb",
        Geometry(short=208, long=208, anchors=(8, 16, 32, 64, 128), canonical=80),
        augment={"flip": 0.5},
        val=None,
        epochs=5,
    ),
}

FULL = list(DATA)
# Too short to converge: longer training alone gains more than any help. A regime of its own, and quick.
DATA["bccd-short"] = replace(DATA["bccd"], epochs=8, batch=4)


@dataclass(frozen=True)
class Pair:
    """Two detectors, and how they are trained beside the data set's number of epochs."""

    student: Pretrained | ModelSpec
    teacher: Pretrained | ModelSpec | str  # or the pair whose trained teacher it has
    lr: float
    student_time: float = 1.0  # factor of the data set's epochs
    teacher_time: float = 1.0  # the same for the teacher
    student_size: float = 1.0  # side of the student's input over that of the data set, which is the teacher's
    batch: int | None = None  # images of a step, where they are not as many as the data set says


LIGHT = ModelSpec(
    blocks=(1, 1, 1),
    width=0.25,
    fpn_channels=32,
    head_dim=128,
    norm="group",
    anchor_sizes=(8, 16, 32, 64),  # the data set's geometry replaces these
    rpn_pre_nms_top_n_train=500,
    rpn_pre_nms_top_n_test=300,
    rpn_post_nms_top_n_train=200,
    rpn_post_nms_top_n_test=100,
    box_batch_size_per_image=64,
)
MOBILENET = Pretrained("mobilenet_v2", channels=64, head_dim=128, frozen=4)
LITE2 = Pretrained("efficientnet_lite2", channels=96, head_dim=256, frozen=4)
RETINANET = Pretrained("mobilenet_v2", channels=64, frozen=4, head="retinanet")

PAIRS = {
    "pretrained": Pair(MOBILENET, LITE2, lr=5e-4, teacher_time=2.5),
    # A student that is fast because it sees small images, taught by a teacher that sees them larger.
    "small-input": Pair(MOBILENET, "pretrained", lr=5e-4, student_size=0.75),
    # Towards the paper's regime, a teacher about two points of AP above the student alone: on BCCD it is four.
    "near": Pair(MOBILENET, "pretrained", lr=5e-4, student_size=0.8),
    # The same in a hurry: a teacher of full-sized images, trained for half as long.
    "close": Pair(MOBILENET, LITE2, lr=5e-4, teacher_time=1.25),
    # As the small recipes have it.
    "scratch": Pair(
        LIGHT,
        LIGHT.model_copy(update={"blocks": (2, 2, 2), "width": 1.0, "fpn_channels": 64, "head_dim": 256}),
        lr=1e-3,
        student_time=2.0,
        teacher_time=2.0,
    ),
    # Other families, and teachers of another family than the student.
    "retinanet": Pair(
        RETINANET,
        Pretrained("efficientnet_lite2", channels=96, frozen=4, head="retinanet"),
        lr=1e-3,
        teacher_time=2.5,
    ),
    "retinanet-two-stage": Pair(RETINANET, "pretrained", lr=1e-3),
    "fcos": Pair(Pretrained("mobilenet_v2", channels=64, frozen=4, head="fcos"), "pretrained", lr=5e-4),
    "ssdlite": Pair(Pretrained("mobilenet_v2", frozen=4, head="ssdlite"), "pretrained", lr=1e-3),
    "rt_detr": Pair(
        Pretrained("mobilenet_v2", channels=96, frozen=4, head="rt_detr"),
        "pretrained",
        lr=1e-3,
        student_time=1.5,
        batch=4,
    ),
}
FAMILIES = ["retinanet", "fcos", "ssdlite", "rt_detr", "retinanet-two-stage"]

RECIPE = DistillSettings(balance="none", feature_norm="none", feature=0.2, regression=0.2)  # found by hand
ONES = DistillSettings(balance="none", feature_norm="none")  # for a balance of the benchmark's, which finds the weights
STANDARDISED = DistillSettings(balance="none", feature_norm="channel")  # the same with standardised features
UNGATED = {"feature_gate": "foreground", "classification_gate": "foreground", "regression_gate": "foreground"}
CONSTANT = ScheduleSettings(kind="constant")

BASELINES = {
    "alone": Method(),
    "alone, longer": Method(time=1.5),  # about what a step with the teacher takes
}
OURS = {
    "tardkd": Method(DistillSettings()),  # with its defaults
    "ours": Method(RECIPE),
    "ours, standardised, balanced": Method(STANDARDISED, share=0.3),
    "ours, balanced": Method(ONES, share=0.3),
    "ours, standardised": Method(replace(STANDARDISED, regression=0.2)),
    "ours, standardised, lasting balance": Method(STANDARDISED, share=0.3, lasting=True),
    # Whole maps, standardised, in place of the features of regions.
    "ours, maps, balanced": Method(replace(ONES, feature=0.0), loss="pkd", share=0.3),
}
RIVALS = {
    "pkd": Method(loss="pkd"),
    "cwd": Method(loss="cwd"),
    "imitation": Method(loss="imitation"),
    "logits and boxes": Method(replace(RECIPE, feature=0.0, schedule=CONSTANT, **UNGATED)),
    "fgd": Method(loss="fgd"),
    "defeat": Method(loss="defeat"),
    "fgfi": Method(loss="fgfi"),
}
BEST = "tardkd"  # what the ablations change
ABLATIONS = {
    f"{BEST}, {name}": Method(replace(DistillSettings(), **change))
    for name, change in {
        "all gates open": UNGATED,
        "feature gate open": {"feature_gate": "foreground"},
        "class gate open": {"classification_gate": "foreground"},
        "box gate open": {"regression_gate": "foreground"},
        "background too": {"feature_gate": "all", "classification_gate": "all"},
        "vs_student": {"regression_gate": "vs_student"},
        "no features": {"feature": 0.0},
        "no classes": {"classification": 0.0},
        "no boxes": {"regression": 0.0},
        "constant": {"schedule": CONSTANT},
        "cosine": {"schedule": ScheduleSettings(kind="cosine")},
        "teacher's proposals": {"sharing": "teacher"},
        "both's proposals": {"sharing": "both"},
        "gaussian term": {"gaussian": 1.0},
        "raw features": {"feature_norm": "none"},
        "weights of 0.3": {"feature": 0.3, "classification": 0.3, "regression": 0.3},
    }.items()
}
PROTOTYPES = {  # of what became tardkd's default; not run any more
    "ours, standardised, lasting balance, all gates open": Method(
        replace(STANDARDISED, **UNGATED), share=0.3, lasting=True
    ),
    "ours, standardised, lasting balance, constant": Method(
        replace(STANDARDISED, schedule=CONSTANT), share=0.3, lasting=True
    ),
}
BALANCED_RIVALS = {  # what of their weights is chance is taken away
    **{f"{name}, balanced": replace(method, share=0.3) for name, method in RIVALS.items()},
    **{f"{name}, lasting balance": replace(method, share=0.3, lasting=True) for name, method in RIVALS.items()},
}
OF_RETINANETS = {  # whose heads have what this looks at
    "crosskd": Method(loss="crosskd"),
    "crosskd, lasting balance": Method(loss="crosskd", share=0.3, lasting=True),
}
METHODS = BASELINES | OF_RETINANETS | OURS | RIVALS | BALANCED_RIVALS | ABLATIONS | PROTOTYPES


@dataclass(frozen=True)
class Run:
    """One student, or one teacher where the method is TEACHER."""

    data: str
    pair: str
    method: str
    seed: int
    factor: float = 1.0  # of the method's weight or share, for the search

    @property
    def name(self) -> str:
        method = self.method if self.factor == 1 else f"{self.method} x{self.factor:g}"
        return f"{self.data}/{self.pair}/{method}/{self.seed}"

    @property
    def origin(self) -> Run:
        """The run that trains this model: where a pair borrows its teacher, that of the other pair."""
        teacher = PAIRS[self.pair].teacher
        return replace(self, pair=teacher) if self.method == TEACHER and isinstance(teacher, str) else self

    @property
    def model(self) -> Pretrained | ModelSpec:
        """What trains."""
        pair = PAIRS[self.origin.pair]
        return pair.teacher if self.method == TEACHER else pair.student

    @property
    def budget(self) -> Budget:
        """How long this model trains."""
        pair, data = PAIRS[self.origin.pair], DATA[self.data]
        time = pair.teacher_time if self.method == TEACHER else pair.student_time * METHODS[self.method].time
        return Budget(epochs=round(data.epochs * time), lr=pair.lr, batch=pair.batch or data.batch)


TEACHER = "teacher"


def runs(
    data: list[str], pairs: list[str], methods: list[str], seeds: int, factors: tuple[float, ...] = (1.0,)
) -> Iterator[Run]:
    """All combinations; first one seed of all, so that an unfinished suite has something to say of every method."""
    for seed, d, pair, factor, method in product(range(seeds), data, pairs, factors, methods):
        yield Run(d, pair, method, seed, factor)


FIRST = [  # what matters most
    "alone",
    "alone, longer",
    BEST,
    "pkd, lasting balance",
    f"{BEST}, all gates open",
    "pkd, balanced",
    "ours, standardised, balanced",
    "logits and boxes, lasting balance",
    "ours",
    "cwd, lasting balance",
    "imitation, lasting balance",
]


def compare(pair: str, data: list[str] = FULL) -> list[Run]:
    """All methods on a pair, three seeds, in the order of what matters."""
    rest = [name for name in (*OURS, *RIVALS, *BALANCED_RIVALS, *BASELINES) if name not in FIRST]
    return [*runs(data, [pair], FIRST, 3), *runs(data, [pair], rest, 3)]


FACTORS = (0.3, 3.0)  # of the small search, beside 1
SUITES = {
    "main": compare("pretrained"),
    "small-input": compare("small-input"),
    "near": compare("near", ["bccd"]),
    "close": compare("close"),
    "scratch": compare("scratch"),
    "short": [*compare("pretrained", ["bccd-short"]), *compare("close", ["bccd-short"])],
    "search": list(runs(FULL, ["small-input", "pretrained"], [*OURS, *RIVALS, *BALANCED_RIVALS], 1, FACTORS)),
    "families": [
        *runs(["bccd"], FAMILIES, ["alone", BEST, "ours, standardised", "pkd, lasting balance"], 3),
        *runs(["bccd"], ["retinanet"], list(OF_RETINANETS), 3),
    ],
    "ablations": list(runs(FULL, ["small-input", "pretrained"], list(ABLATIONS), 3)),
    "family-ablations": list(runs(["bccd"], FAMILIES, list(ABLATIONS), 3)),
}
