"""The models of the conformance matrix: small ones of the families that accelerator toolchains are asked to run.

Weights are drawn, statistics of norms too, so that folding them does something. Inputs are float tensors but for texts.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Made = tuple[nn.Module, dict[str, Tensor]]  # the model, and inputs by argument name


def image(size: int = 64, batch: int = 2) -> Tensor:
    """Smooth pictures, as photographs are."""
    noise = torch.randn(batch, 3, size // 8, size // 8, generator=torch.Generator().manual_seed(1))
    return F.interpolate(noise, size=(size, size), mode="bilinear")


def _tokens(vocabulary: int = 100, length: int = 16) -> dict[str, Tensor]:
    ids = torch.randint(0, vocabulary, (2, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class First(nn.Module):
    """The first output of a transformers model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.model(**inputs)[0]


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)  # one for both, as torchvision has it
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """As torchvision's, of fewer and narrower blocks."""

    def __init__(self, widths: tuple[int, ...] = (16, 16, 32, 64), classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        pairs = list(itertools.pairwise(widths))
        self.layers = nn.Sequential(*(Block(a, b, 1 + (i > 0)) for i, (a, b) in enumerate(pairs)))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class UNet(nn.Module):
    """Down by strides and pooling, up by a transposed convolution and by interpolation, with skips joined."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.enter = self._pair(3, width)
        self.down1 = self._pair(width, 2 * width)
        self.down2 = self._pair(2 * width, 4 * width)
        self.pool = nn.MaxPool2d(2)
        self.up1 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.mix1 = self._pair(4 * width, 2 * width)
        self.up2 = nn.Upsample(scale_factor=2, mode="nearest")
        self.mix2 = self._pair(3 * width, width)
        self.head = nn.Conv2d(width, 2, 1)

    @staticmethod
    def _pair(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            *(nn.Conv2d(inputs, outputs, 3, 1, 1), nn.BatchNorm2d(outputs), nn.ReLU()),
            *(nn.Conv2d(outputs, outputs, 3, 1, 1), nn.BatchNorm2d(outputs), nn.ReLU()),
        )

    def forward(self, x: Tensor) -> Tensor:
        a = self.enter(x)
        b = self.down1(self.pool(a))
        c = self.down2(self.pool(b))
        d = self.mix1(torch.cat([self.up1(c), b], 1))
        return self.head(self.mix2(torch.cat([self.up2(d), a], 1)))


class DenseNet(nn.Module):
    """Each layer reads all before it, joined."""

    def __init__(self, growth: int = 8, layers: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        widths = [16 + growth * i for i in range(layers)]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(w), nn.ReLU(), nn.Conv2d(w, growth, 3, 1, 1)) for w in widths
        )
        self.transition = nn.Sequential(nn.Conv2d(16 + growth * layers, 16, 1), nn.ReLU(), nn.AvgPool2d(2))
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return self.fc(self.transition(x).mean((2, 3)))


class TCN(nn.Module):
    """Dilated causal convolutions whose weights are normalized, as temporal convolutional networks have them."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.enter = nn.Conv1d(3, width, 1)
        self.convs = nn.ModuleList(norm(nn.Conv1d(width, width, 3, dilation=2**i, padding=2 * 2**i)) for i in range(2))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for conv in self.convs:
            x = x + torch.relu(conv(x)[..., : x.shape[-1]])
        return self.head(x.mean(-1))


class BiLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 16, batch_first=True, bidirectional=True)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


def _from(name: str, **options: Any) -> Callable[[], nn.Module]:
    """A transformers model by the name of its class, of a configuration with these options."""

    def make() -> nn.Module:
        import transformers

        model_class = getattr(transformers, name)
        config = model_class.config_class(**options)
        return First(model_class(config))

    return make


def _whisper() -> nn.Module:
    import transformers

    config = transformers.WhisperConfig(
        vocab_size=100, num_mel_bins=16, encoder_layers=2, decoder_layers=1, d_model=32, encoder_ffn_dim=64,
        decoder_ffn_dim=64, encoder_attention_heads=2, decoder_attention_heads=2, max_source_positions=32,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return First(transformers.WhisperModel(config).get_encoder())


class DETR(nn.Module):
    """A detector: frozen batch norms in its backbone, queries that are parameters, heads for classes and boxes."""

    def __init__(self) -> None:
        import transformers

        super().__init__()
        backbone: dict[str, Any] = {"layer_type": "basic", "out_features": ["stage2"]}
        backbone |= {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}
        parts = ("encoder", "decoder")
        options: dict[str, Any] = {"d_model": 32, "num_queries": 8, "num_labels": 5, "use_timm_backbone": False}
        options |= {f"{part}_layers": 1 for part in parts} | {f"{part}_ffn_dim": 64 for part in parts}
        options |= {f"{part}_attention_heads": 2 for part in parts}
        config = transformers.DetrConfig(backbone_config=transformers.ResNetConfig(**backbone), **options)
        self.detr = transformers.DetrForObjectDetection(config)
        for name, tensor in (*self.detr.named_parameters(), *self.detr.named_buffers()):
            if name.endswith("running_var"):
                nn.init.uniform_(tensor, 0.5, 2.0)
            elif name.endswith(("bias", "running_mean")):
                nn.init.normal_(tensor, std=0.1)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        found = self.detr(pixel_values)
        return found.logits, found.pred_boxes


_VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_TEXT = _VIT | {"vocab_size": 100, "max_position_embeddings": 64}
_DRAWN: Final[Mapping[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]]] = {
    "resnet": (ResNet, lambda: {"x": image()}),
    "mobilenet-v2": (
        _from("MobileNetV2Model", image_size=64, depth_multiplier=0.25),
        lambda: {"pixel_values": image()},
    ),
    "efficientnet": (
        _from(
            "EfficientNetModel",
            image_size=64,
            width_coefficient=0.25,
            depth_coefficient=0.3,
            hidden_dim=320,
        ),
        lambda: {"pixel_values": image()},
    ),
    "convnext": (
        _from("ConvNextModel", hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1, 1]),
        lambda: {"pixel_values": image()},
    ),
    "regnet": (
        _from("RegNetModel", embedding_size=16, hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1, 1], groups_width=8),
        lambda: {"pixel_values": image()},
    ),
    "unet": (UNet, lambda: {"x": image(32)}),
    "densenet": (DenseNet, lambda: {"x": image(32)}),
    "vit": (
        _from("ViTModel", image_size=32, patch_size=8, **_VIT),
        lambda: {"pixel_values": image(32)},
    ),
    "swin": (
        _from("SwinModel", image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=4),
        lambda: {"pixel_values": image(32)},
    ),
    "segformer": (
        _from(
            "SegformerModel",
            num_encoder_blocks=2,
            depths=[1, 1],
            hidden_sizes=[16, 32],
            num_attention_heads=[1, 2],
            sr_ratios=[4, 2],
            patch_sizes=[7, 3],
            strides=[4, 2],
            mlp_ratios=[2, 2],
        ),
        lambda: {"pixel_values": image(32)},
    ),
    "detr": (DETR, lambda: {"pixel_values": image(32)}),
    "bert": (_from("BertModel", **_TEXT), _tokens),
    "distilbert": (
        _from(
            "DistilBertModel", vocab_size=100, dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=64
        ),
        _tokens,
    ),
    "whisper-encoder": (_whisper, lambda: {"input_features": torch.randn(2, 16, 64)}),
    "wav2vec2": (
        _from(
            "Wav2Vec2Model",
            **_VIT,
            vocab_size=20,
            conv_dim=(16, 16),
            conv_stride=(5, 2),
            conv_kernel=(10, 3),
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=2,
            num_feat_extract_layers=2,
        ),
        lambda: {"input_values": torch.randn(2, 800)},
    ),
    "tcn": (TCN, lambda: {"x": torch.randn(2, 3, 40)}),
    "bilstm": (BiLSTM, lambda: {"x": torch.randn(2, 12, 16)}),
}
MODELS: Final = tuple(_DRAWN)


def model(name: str) -> Made:
    """The model of this name in evaluation, and inputs; the same in every process."""
    make, inputs = _DRAWN[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = make().eval()
        for module in made.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):  # pyright: ignore[reportPrivateUsage]
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2.0)
        return made, inputs()
