"""Small models of many families, with example inputs, and whatever a graph of theirs takes."""

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from graphq.capture.source import Source, with_total

Family = tuple[nn.Module, dict[str, Tensor] | None, dict[str, int]]
_SIZES: Final[dict[str, Any]] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
_TEXT: Final[dict[str, Any]] = {"vocab_size": 64, "max_position_embeddings": 20, **_SIZES}
_BACKBONE: Final[dict[str, Any]] = {
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 16, 16],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def tokens() -> dict[str, Tensor]:
    ids = torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones(2, 6, dtype=torch.int64)}


def _encoder(name: str, **options: Any) -> Family:
    import transformers

    config = getattr(transformers, f"{name}Config")(**_TEXT, **options)
    return getattr(transformers, f"{name}Model")(config), tokens(), {}


def _two_towers(name: str, **options: Any) -> Family:
    import transformers

    vision = {"image_size": 32, "patch_size": 8, **_SIZES}
    config = getattr(transformers, f"{name}Config")(text_config=_TEXT | options, vision_config=vision)
    return getattr(transformers, f"{name}Model")(config), tokens() | {"pixel_values": floats(2, 3, 32, 32)}, {}


def _rt_detr() -> Family:
    import transformers as typed

    transformers: Any = typed
    names, last = ["stage2", "stage3", "stage4"], [16, 16, 16]
    config = transformers.RTDetrConfig(
        backbone_config=transformers.RTDetrResNetConfig(**_BACKBONE, out_features=names),
        encoder_hidden_dim=16, encoder_in_channels=last, encoder_layers=1, encoder_ffn_dim=16, encoder_attention_heads=2,
        decoder_in_channels=last, d_model=16, num_queries=6, decoder_layers=2, decoder_ffn_dim=16,
        decoder_attention_heads=2, decoder_n_points=2, num_labels=3, num_denoising=0,
    )  # fmt: skip
    # It asks for len() of a tensor, which is no symbol.
    return transformers.RTDetrForObjectDetection(config), {"pixel_values": floats(1, 3, 64, 64)}, {"batch": 1}


def _detr() -> Family:
    import transformers as typed

    transformers: Any = typed
    config = transformers.DetrConfig(
        backbone_config=transformers.ResNetConfig(**_BACKBONE, out_features=["stage4"]),
        use_timm_backbone=False, backbone=None, d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=5,
    )  # fmt: skip
    return transformers.DetrForObjectDetection(config), {"pixel_values": floats(2, 3, 64, 64)}, {}


def _whisper() -> Family:
    import transformers
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = transformers.WhisperConfig(
        d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=32, num_mel_bins=8,
        max_source_positions=10, vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return WhisperEncoder(config), {"input_features": floats(2, 8, 20)}, {}


def _wav2vec2() -> Family:
    import transformers as typed

    transformers: Any = typed
    config = transformers.Wav2Vec2Config(
        conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, **_SIZES,
    )  # fmt: skip
    return transformers.Wav2Vec2Model(config), {"input_values": floats(2, 400)}, {}


def _swin() -> Family:
    import transformers

    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4
    )
    return transformers.SwinModel(config), None, {}


def _segformer() -> Family:
    import transformers

    config = transformers.SegformerConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16], num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16
    )
    return transformers.SegformerForSemanticSegmentation(config), {"pixel_values": floats(2, 3, 64, 64)}, {}


class Pyramid(nn.Module):
    """A detector's head: one tensor of all places, and the maps that it was made of."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.head = nn.Conv2d(8, 6, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        p3 = self.stem(x).relu()
        p4 = self.down(p3).relu()
        maps = [self.head(p3), self.head(p4)]
        return torch.cat([one.flatten(2) for one in maps], 2), maps


FAMILIES: Final[dict[str, Callable[[], Family]]] = {
    "bert": lambda: _encoder("Bert"),
    "electra": lambda: _encoder("Electra", embedding_size=8),
    "deberta_v2": lambda: _encoder(
        "DebertaV2", relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8
    ),
    "clip": lambda: _two_towers("CLIP", bos_token_id=1, eos_token_id=2, pad_token_id=0),
    "siglip": lambda: _two_towers("Siglip", bos_token_id=1, eos_token_id=2),
    "rt_detr": _rt_detr,
    "detr": _detr,
    "whisper": _whisper,
    "wav2vec2": _wav2vec2,
    "swin": _swin,
    "segformer": _segformer,
    "detector": lambda: (Pyramid(), {"x": floats(2, 3, 32, 32)}, {}),
}


def given(source: Source, sizes: Mapping[str, int]) -> tuple[Tensor, ...]:
    """Inputs of these sizes: ids, masks of ones, noise."""
    generator = torch.Generator().manual_seed(1)
    sizes = with_total(dict(sizes))
    made: list[Tensor] = []
    for one in source.inputs:
        shape = [sizes[d] if isinstance(d, str) else d for d in one.shape]
        if one.dtype.is_floating_point:
            made.append(torch.randn(shape, generator=generator))
        elif "mask" in one.name:
            made.append(torch.ones(shape, dtype=one.dtype))
        else:
            made.append(torch.randint(3, 60, shape, generator=generator))
    return tuple(made)
