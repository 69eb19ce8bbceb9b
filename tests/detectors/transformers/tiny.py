"""transformers' detectors that are quick on a CPU, with random weights, and batches as they take them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from detectors.tiny import tiny_batch

KINDS = ("rt_detr", "rt_detr_v2", "d_fine")


def tiny_query_detector(kind: str = "rt_detr", *, seed: int = 0, channels: int = 16, **options: Any) -> nn.Module:
    """A detector of three classes with levels of strides 8, 16 and 32."""
    import transformers

    torch.manual_seed(seed)
    name = {"rt_detr": "RTDetr", "rt_detr_v2": "RTDetrV2", "d_fine": "DFine"}[kind]
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, layer_type="basic", out_indices=[2, 3, 4]
    )
    settings = {
        "backbone_config": backbone,
        "encoder_hidden_dim": channels,
        "encoder_in_channels": [8] * 3,
        "encoder_ffn_dim": 16,
        "encoder_attention_heads": 2,
        "d_model": 16,
        "num_queries": 12,
        "decoder_in_channels": [channels] * 3,
        "decoder_ffn_dim": 16,
        "decoder_layers": 2,
        "decoder_attention_heads": 2,
        "decoder_n_points": 2,
        "num_denoising": 6,
        "num_labels": 3,
        **({"lqe_hidden_dim": 8} if kind == "d_fine" else {}),
        **options,
    }
    return getattr(transformers, f"{name}ForObjectDetection")(getattr(transformers, f"{name}Config")(**settings))


def tiny_detr(kind: str = "detr", *, seed: int = 0, **options: Any) -> nn.Module:
    """A DETR ("detr") of three classes with a map of stride 32, or one ("deformable_detr") with four from stride 8."""
    import transformers

    torch.manual_seed(seed)
    stages = ["stage4"] if kind == "detr" else ["stage2", "stage3", "stage4"]
    settings = {
        "backbone_config": transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, layer_type="basic", out_features=stages
        ),
        "d_model": 32,
        "encoder_layers": 1,
        "encoder_ffn_dim": 16,
        "encoder_attention_heads": 2,
        "decoder_layers": 2,
        "decoder_ffn_dim": 16,
        "decoder_attention_heads": 2,
        "num_queries": 12,
        "num_labels": 3,
        "dropout": 0.0,
        **({} if kind == "detr" else {"num_feature_levels": 4}),
        **options,
    }
    name = {"detr": "Detr", "deformable_detr": "DeformableDetr"}[kind]
    return getattr(transformers, f"{name}ForObjectDetection")(getattr(transformers, f"{name}Config")(**settings))


def tiny_call(seed: int = 0, empty: bool = False, size: tuple[int, int] = (64, 96)) -> dict[str, Any]:
    """Two images of one size with two boxes and one; with ``empty`` the second image has none."""
    generator = torch.Generator().manual_seed(seed)
    labels: list[dict[str, Tensor]] = [
        {
            "class_labels": torch.tensor([0, 2]),
            "boxes": torch.tensor([[0.3, 0.4, 0.4, 0.5], [0.7, 0.6, 0.3, 0.4]]),
        },
        {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.5, 0.6]])},
    ]
    if empty:
        labels[1] = {"class_labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
    return {"pixel_values": torch.rand(2, 3, *size, generator=generator), "labels": labels}


__all__ = ["KINDS", "tiny_batch", "tiny_call", "tiny_detr", "tiny_query_detector"]
