"""Detection data: COCO-format folders, the built-in scenes, training views and batches."""

from .coco import CocoDetection
from .loader import build_loader
from .scenes import Scenes, write_scenes
from .transforms import build_transform

__all__ = ["CocoDetection", "Scenes", "build_loader", "build_transform", "write_scenes"]
