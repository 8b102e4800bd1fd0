"""Tiny models: one of each transformers family that graphq knows, and small modules with one feature each."""

import copy
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from graphq.capture.modules import capture_module
from graphq.capture.source import source_of
from graphq.data.batches import complete
from graphq.runtime import ops

DECODERS = ("llama", "qwen3", "gemma3", "mixtral", "deepseek", "opt", "gpt2")
FAMILIES = (*DECODERS, "bert", "vit", "resnet")

_COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 128,
}
_DECODER = _COMMON | {"num_key_value_heads": 2, "head_dim": 16}
_OPTIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _DECODER),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _DECODER),
    "gemma3": (  # the only one here that slides a window, and one of three with a tied head
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        _DECODER | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", _DECODER | {"num_local_experts": 4}),
    "deepseek": (  # one dense block, one of experts; low-rank attention
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        _COMMON
        | {
            "num_key_value_heads": 4,
            "moe_intermediate_size": 48,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 32,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "n_shared_experts": 1,
        },
    ),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            "hidden_size": 64,
            "ffn_dim": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 128,
            "word_embed_proj_dim": 64,
            "max_position_embeddings": 128,
        },
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 128},
    ),
    "bloom": (  # no rotary positions: what it adds to its scores comes of the mask
        "BloomForCausalLM",
        "BloomConfig",
        {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128},
    ),
    "gpt_oss": (  # a sink beside the scores of each row
        "GptOssForCausalLM",
        "GptOssConfig",
        _DECODER
        | {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "bert": ("BertModel", "BertConfig", _COMMON),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
        },
    ),
    "resnet": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic", "image_size": 32},
    ),
}


def tiny_config(family: str, **options: Any) -> tuple[Any, Any]:
    """The model class and the configuration of a family, with ``options`` on top of the tiny ones."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, config, defaults = _OPTIONS[family]
    return getattr(transformers, model), getattr(transformers, config)(**(defaults | options))


def tiny(family: str, **options: Any) -> Any:
    """A model of this family with the same random weights each time, in evaluation mode."""
    cls, config = tiny_config(family, **options)
    torch.manual_seed(0)
    return cls(config).eval()


@functools.cache
def _captured(family: str) -> fx.GraphModule:
    from graphq.capture.hugging_face import capture_pretrained

    return capture_pretrained(tiny(family))


def captured(family: str) -> fx.GraphModule:
    """The graph of ``tiny(family)``, to be changed at will: captured once a process, copied at each call."""
    return copy.deepcopy(_captured(family))


def random_inputs(gm: fx.GraphModule, batch: int = 3, sequence: int = 7, seed: int = 0) -> tuple[Tensor, ...]:
    """Complete inputs of a captured model: random tokens or pixels, full masks, empty caches."""
    generator = torch.Generator().manual_seed(seed)
    wanted = source_of(gm).inputs[0]
    sizes = {"batch": batch, "sequence": sequence}
    shape = [sizes[d] if isinstance(d, str) else d for d in wanted.shape]
    if wanted.dtype.is_floating_point:
        return complete(source_of(gm), torch.randn(shape, generator=generator).to(wanted.dtype))
    return complete(source_of(gm), torch.randint(0, 100, shape, generator=generator))


_GRAPHS: dict[object, fx.GraphModule] = {}


def capture(model: nn.Module, *inputs: Tensor, once: bool = False) -> fx.GraphModule:
    """The graph of a small module, whose parameters are random numbers that are the same each time.

    The modules below are captured once a process, and copied at each call. So are those of which ``once`` says that
    their class and their text say all that they compute.
    """
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    if not once and type(model).__module__ != __name__:
        return capture_module(model.eval(), inputs)
    key = (type(model), str(model), str([(x.shape, x.dtype) for x in (*model.parameters(), *inputs)]))
    if key not in _GRAPHS:
        _GRAPHS[key] = capture_module(model.eval(), inputs)
    return copy.deepcopy(_GRAPHS[key])


class MLP(nn.Module):
    """Two linears."""

    def __init__(self, width: int = 8, hidden: int = 12, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)))


class Blocks(nn.Module):
    """Two repeated MLPs and a head outside of them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([MLP(), MLP()])
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Attention(nn.Module):
    """Three linears that read one activation."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.layer_norm(x, x.shape[-1:])
        return self.q_proj(h) * self.k_proj(h) + self.v_proj(h)


class Twice(nn.Module):
    """One linear, called on two activations."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(F.relu(self.shared(x)))


class Tied(nn.Module):
    """An embedding whose weight is the head's, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(F.silu(self.embedding(tokens)))


class ConvBnRelu(nn.Module):
    """A convolution with its batch norm, then a depthwise one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        return self.depthwise(F.relu(self.bn(self.conv(x))))


class MoE(nn.Module):
    """Each row of ``x[T, 8]`` goes to the one of 4 experts that the router scores highest; gate and up are fused."""

    def __init__(self, count: int = 4, width: int = 8, hidden: int = 6) -> None:
        super().__init__()
        self.router = nn.Linear(width, count, bias=False)
        self.experts = nn.ParameterDict(
            {
                "gate_up_proj": nn.Parameter(torch.empty(count, 2 * hidden, width)),
                "down_proj": nn.Parameter(torch.empty(count, width, hidden)),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        order, offsets = route(self.router(x))
        gate, up = ops.grouped_linear(x[order], self.experts["gate_up_proj"], offsets).chunk(2, -1)
        out = ops.grouped_linear(F.silu(gate) * up, self.experts["down_proj"], offsets)
        return out[order.argsort()]


def route(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The rows in the order of their experts, and where each expert's rows end."""
    chosen, order = scores.argmax(-1).sort()
    counts = (chosen.unsqueeze(-1) == torch.arange(scores.shape[-1])).sum(0)
    return order, counts.cumsum(0, dtype=torch.int32)
