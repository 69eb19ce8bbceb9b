"""Small RT-DETRv2 and D-FINE, from transformers' classes with random weights; nothing is downloaded.

A recipe names them as it names a detector of one's own: ``model: tardkd.train.query_models:rt_detr_v2_r18``. A model of
timm's may stand in the place of their ResNet, with weights from a file.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tardkd.weights import Weights, fill

STRIDES = (8, 16, 32)  # of the maps that the encoder takes
SIZE = 320  # pixels of the longer side that images are resized to
WIDTHS = (64, 128, 256, 512)  # channels of the ResNet's stages


def rt_detr_v2_r18(num_classes: int, backbone: str | None = None) -> nn.Module:
    """RT-DETRv2 on a ResNet-18, with two decoder layers; for ``num_classes`` with the background.

    Args:
        backbone: the name of a model of timm's in the ResNet's place.
    """
    from transformers import RTDetrV2Config, RTDetrV2ForObjectDetection

    settings = _settings(num_classes, (2, 2, 2, 2), 96, 2, backbone)
    return _normalising(RTDetrV2ForObjectDetection(RTDetrV2Config(**settings)))


def rt_detr_v2_r34(num_classes: int, backbone: str | None = None) -> nn.Module:
    """RT-DETRv2 on a ResNet-34, with three wider decoder layers; otherwise as :func:`rt_detr_v2_r18`."""
    from transformers import RTDetrV2Config, RTDetrV2ForObjectDetection

    settings = _settings(num_classes, (3, 4, 6, 3), 128, 3, backbone)
    return _normalising(RTDetrV2ForObjectDetection(RTDetrV2Config(**settings)))


def d_fine_r18(num_classes: int, backbone: str | None = None) -> nn.Module:
    """D-FINE on a ResNet-18, with two decoder layers; otherwise as :func:`rt_detr_v2_r18`."""
    from transformers import DFineConfig, DFineForObjectDetection

    settings = _settings(num_classes, (2, 2, 2, 2), 96, 2, backbone)
    return _normalising(DFineForObjectDetection(DFineConfig(**settings)))


def fill_backbone(model: nn.Module, weights: Weights) -> None:
    """Fill the model's timm backbone from a classifier's weights, whose last layers are left out.

    Raises:
        ValueError: it has no such backbone, or the weights do not fit it tensor by tensor.
    """
    trunk = _timm_trunk(model)
    if trunk is None:
        raise ValueError(f"backbone_weights: this {type(model).__name__} has no backbone of timm's; see backbone")
    own = trunk.state_dict()
    # Where a stage is one of a sequence, timm's trunk calls it stages_0 and its classifier stages.0.
    named = {
        name if name in own else re.sub(r"^(\w+)\.(\d+)\.", r"\1_\2.", name): value
        for name, value in weights.tensors.items()
    }
    fill(trunk, replace(weights, tensors={name: value for name, value in named.items() if name in own}))


def _settings(
    num_classes: int, depths: tuple[int, ...], channels: int, layers: int, backbone: str | None
) -> dict[str, Any]:
    config, widths = _resnet(depths) if backbone is None else _of_timm(backbone)
    return {
        "backbone_config": config,
        # Random weights: their statistics are yet to be learnt. Those of a file are kept by `freeze_norm`.
        "freeze_backbone_batch_norms": False,
        "encoder_in_channels": list(widths),
        "encoder_hidden_dim": channels,
        "encoder_ffn_dim": 4 * channels,
        "encoder_attention_heads": channels // 16,
        "d_model": channels,
        "decoder_in_channels": [channels] * 3,
        "decoder_ffn_dim": 4 * channels,
        "decoder_layers": layers,
        "decoder_attention_heads": channels // 16,
        "num_queries": 100,
        "num_denoising": 50,
        "num_labels": num_classes - 1,
        "anchor_image_size": [SIZE, SIZE],
    }


def _resnet(depths: tuple[int, ...]) -> tuple[Any, tuple[int, ...]]:
    """The configuration of a ResNet with so many blocks in its stages, and the channels of its maps."""
    from transformers import RTDetrResNetConfig

    config = RTDetrResNetConfig(
        embedding_size=WIDTHS[0], hidden_sizes=WIDTHS, depths=depths, layer_type="basic", out_indices=[2, 3, 4]
    )
    return config, WIDTHS[1:]


def _of_timm(name: str) -> tuple[Any, tuple[int, ...]]:
    """The configuration of a model of timm's, and the channels of its maps.

    Raises:
        ValueError: timm is not there, has no such model, or the model has no maps of these strides.
    """
    try:
        import timm
    except ModuleNotFoundError:
        raise ValueError(f"backbone {name} needs the package timm: pip install timm") from None
    from transformers import TimmBackboneConfig

    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name}")
    with torch.device("meta"):
        maps = timm.create_model(name, features_only=True).feature_info
    strides, channels = maps.reduction(), maps.channels()
    missing = [str(stride) for stride in STRIDES if stride not in strides]
    if missing:
        raise ValueError(f"backbone {name} has maps of strides {strides}, none of {', '.join(missing)}")
    places = [strides.index(stride) for stride in STRIDES]
    return TimmBackboneConfig(backbone=name, out_indices=places), tuple(channels[place] for place in places)


def _timm_trunk(model: nn.Module) -> Any:
    """The module of timm's in a model of transformers'; None if it has none."""
    encoder = getattr(getattr(model, "model", None), "backbone", None)
    return getattr(getattr(encoder, "model", None), "_backbone", None)


def _normalising(model: nn.Module) -> nn.Module:
    """The model, whose timm backbone takes images in [0, 1], as RT-DETR does, and normalises them as it was trained."""
    trunk = _timm_trunk(model)
    if trunk is not None:
        trained = trunk.pretrained_cfg
        trunk.register_forward_pre_hook(partial(_normalise, tuple(trained["mean"]), tuple(trained["std"])))
    return model


def _normalise(
    mean: tuple[float, ...], std: tuple[float, ...], trunk: nn.Module, args: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """What a trunk is to be called with for its ``args``, images (N, 3, H, W) in [0, 1]."""
    shift, factor = (args[0].new_tensor(values)[:, None, None] for values in (mean, std))
    return (args[0] - shift) / factor, *args[1:]
