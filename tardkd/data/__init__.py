"""Detection data: COCO-format and VOC folders, the built-in scenes, training views and batches."""

from .coco import CocoDetection
from .loader import build_loader, to_float
from .scenes import Scenes, write_scenes
from .transforms import build_transform
from .voc import VocDetection

__all__ = ["CocoDetection", "Scenes", "VocDetection", "build_loader", "build_transform", "to_float", "write_scenes"]
