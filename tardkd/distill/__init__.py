"""The distillation framework: proposal sharing, gates, schedules, and the :class:`Distiller`."""

from .checks import load_teacher_weights
from .distiller import Distiller
from .pairing import Teacher
from .schedule import Schedule
from .settings import DistillSettings, ScheduleSettings

__all__ = ["DistillSettings", "Distiller", "Schedule", "ScheduleSettings", "Teacher", "load_teacher_weights"]
