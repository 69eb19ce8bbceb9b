"""The formats that a student is exported to, and which ending of a file's name means which."""

from __future__ import annotations

SUFFIXES = {
    ".pt": "state_dict",
    ".pth": "state_dict",
    ".safetensors": "safetensors",
    ".ts": "torchscript",
    ".onnx": "onnx",
}
FORMATS = tuple(dict.fromkeys(SUFFIXES.values()))
