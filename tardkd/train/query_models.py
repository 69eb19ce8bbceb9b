"""Small RT-DETRv2 and D-FINE, from transformers' classes with random weights; nothing is downloaded.

A recipe names them as it names a detector of one's own: ``model: tardkd.train.query_models:rt_detr_v2_r18``.
"""

from __future__ import annotations

from typing import Any

from torch import nn

SIZE = 320  # pixels of the longer side that images are resized to
WIDTHS = (64, 128, 256, 512)  # channels of the ResNet's stages


def rt_detr_v2_r18(num_classes: int) -> nn.Module:
    """RT-DETRv2 on a ResNet-18, with two decoder layers; for ``num_classes`` with the background."""
    from transformers import RTDetrV2Config, RTDetrV2ForObjectDetection

    return RTDetrV2ForObjectDetection(RTDetrV2Config(**_settings(num_classes, (2, 2, 2, 2), 96, 2)))


def rt_detr_v2_r34(num_classes: int) -> nn.Module:
    """RT-DETRv2 on a ResNet-34, with three wider decoder layers; for ``num_classes`` with the background."""
    from transformers import RTDetrV2Config, RTDetrV2ForObjectDetection

    return RTDetrV2ForObjectDetection(RTDetrV2Config(**_settings(num_classes, (3, 4, 6, 3), 128, 3)))


def d_fine_r18(num_classes: int) -> nn.Module:
    """D-FINE on a ResNet-18, with two decoder layers; for ``num_classes`` with the background."""
    from transformers import DFineConfig, DFineForObjectDetection

    return DFineForObjectDetection(DFineConfig(**_settings(num_classes, (2, 2, 2, 2), 96, 2)))


def _settings(num_classes: int, depths: tuple[int, ...], channels: int, layers: int) -> dict[str, Any]:
    from transformers import RTDetrResNetConfig

    backbone = RTDetrResNetConfig(
        embedding_size=WIDTHS[0], hidden_sizes=WIDTHS, depths=depths, layer_type="basic", out_indices=[2, 3, 4]
    )
    return {
        "backbone_config": backbone,
        "freeze_backbone_batch_norms": False,  # random weights: their statistics are yet to be learnt
        "encoder_in_channels": list(WIDTHS[1:]),
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
