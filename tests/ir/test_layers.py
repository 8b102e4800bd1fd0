"""The layers of a graph: kinds, shapes, blocks, and the roles that keep some float unless they are named."""

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn

from graphq.ir.layers import layer_path, layers, sites, weight_param
from graphq.ir.views import Weighted, ops_of
from graphq.passes.raise_grouped_linear import RaiseGroupedLinear
from graphq.passes.split_gate_up import SplitGateUp
from tests.models import Blocks, ConvBnRelu, MoE, Tied, Twice, capture, captured, route


def table(gm: fx.GraphModule, containing: str = "") -> str:
    """A line for each layer: name, kind, shape, block, and why it is quantized only when named."""
    lines = [
        f"{name}: {x.kind} {list(x.shape)} block {x.block}" + (f" ({x.named_only})" if x.named_only else "")
        for name, x in layers(gm).items()
        if containing in name
    ]
    return "\n".join(lines) + "\n"


def with_experts(family: str) -> fx.GraphModule:
    gm = captured(family)
    RaiseGroupedLinear().run(gm)
    SplitGateUp().run(gm)
    return gm


def test_layer_path() -> None:
    assert [layer_path(f"a.{name}_weight") for name in ("in_proj", "kv_proj", "my_proj")] == [
        "a.in_proj",
        "a.kv_proj",
        "a.my_proj_weight",
    ]
    names = ["a.b.weight", "a.experts.gate_proj", "weight", "a.weights", "a.weight_g"]
    assert [layer_path(name) for name in names] == ["a.b", "a.experts.gate_proj", "weight", "a.weights", "a.weight_g"]


# -- families ----------------------------------------------------------------------------------------------------------


def test_llama() -> None:
    assert_expected_inline(
        table(captured("llama")),
        """\
model.embed_tokens: embedding [128, 64] block None (embedding)
model.layers.0.self_attn.q_proj: linear [64, 64] block 0
model.layers.0.self_attn.k_proj: linear [32, 64] block 0
model.layers.0.self_attn.v_proj: linear [32, 64] block 0
model.layers.0.self_attn.o_proj: linear [64, 64] block 0
model.layers.0.mlp.gate_proj: linear [96, 64] block 0
model.layers.0.mlp.up_proj: linear [96, 64] block 0
model.layers.0.mlp.down_proj: linear [64, 96] block 0
model.layers.1.self_attn.q_proj: linear [64, 64] block 1
model.layers.1.self_attn.k_proj: linear [32, 64] block 1
model.layers.1.self_attn.v_proj: linear [32, 64] block 1
model.layers.1.self_attn.o_proj: linear [64, 64] block 1
model.layers.1.mlp.gate_proj: linear [96, 64] block 1
model.layers.1.mlp.up_proj: linear [96, 64] block 1
model.layers.1.mlp.down_proj: linear [64, 96] block 1
lm_head: linear [128, 64] block None (output head)
""",
    )


def test_mixtral() -> None:
    assert_expected_inline(
        table(with_experts("mixtral"), "layers.1.mlp"),
        """\
model.layers.1.mlp.gate: linear [4, 64] block 1 (router)
model.layers.1.mlp.experts.0.gate_proj: expert [96, 64] block 1
model.layers.1.mlp.experts.1.gate_proj: expert [96, 64] block 1
model.layers.1.mlp.experts.2.gate_proj: expert [96, 64] block 1
model.layers.1.mlp.experts.3.gate_proj: expert [96, 64] block 1
model.layers.1.mlp.experts.0.up_proj: expert [96, 64] block 1
model.layers.1.mlp.experts.1.up_proj: expert [96, 64] block 1
model.layers.1.mlp.experts.2.up_proj: expert [96, 64] block 1
model.layers.1.mlp.experts.3.up_proj: expert [96, 64] block 1
model.layers.1.mlp.experts.0.down_proj: expert [64, 96] block 1
model.layers.1.mlp.experts.1.down_proj: expert [64, 96] block 1
model.layers.1.mlp.experts.2.down_proj: expert [64, 96] block 1
model.layers.1.mlp.experts.3.down_proj: expert [64, 96] block 1
""",
    )


def test_deepseek() -> None:
    assert_expected_inline(
        table(with_experts("deepseek"), "layers.1"),
        """\
model.layers.1.self_attn.q_a_proj: linear [32, 64] block 1
model.layers.1.self_attn.q_b_proj: linear [96, 32] block 1
model.layers.1.self_attn.kv_a_proj_with_mqa: linear [24, 64] block 1
model.layers.1.self_attn.kv_b_proj: linear [128, 16] block 1
model.layers.1.self_attn.o_proj: linear [64, 64] block 1
model.layers.1.mlp.gate: linear [4, 64] block 1 (router)
model.layers.1.mlp.experts.0.gate_proj: expert [48, 64] block 1
model.layers.1.mlp.experts.1.gate_proj: expert [48, 64] block 1
model.layers.1.mlp.experts.2.gate_proj: expert [48, 64] block 1
model.layers.1.mlp.experts.3.gate_proj: expert [48, 64] block 1
model.layers.1.mlp.experts.0.up_proj: expert [48, 64] block 1
model.layers.1.mlp.experts.1.up_proj: expert [48, 64] block 1
model.layers.1.mlp.experts.2.up_proj: expert [48, 64] block 1
model.layers.1.mlp.experts.3.up_proj: expert [48, 64] block 1
model.layers.1.mlp.experts.0.down_proj: expert [64, 48] block 1
model.layers.1.mlp.experts.1.down_proj: expert [64, 48] block 1
model.layers.1.mlp.experts.2.down_proj: expert [64, 48] block 1
model.layers.1.mlp.experts.3.down_proj: expert [64, 48] block 1
model.layers.1.mlp.shared_experts.gate_proj: linear [48, 64] block 1
model.layers.1.mlp.shared_experts.up_proj: linear [48, 64] block 1
model.layers.1.mlp.shared_experts.down_proj: linear [64, 48] block 1
""",
    )


def test_gpt2_has_weights_stored_transposed_and_a_tied_head() -> None:
    assert_expected_inline(
        table(captured("gpt2")),
        """\
transformer.wte: embedding [128, 64] block None (embedding)
transformer.wpe: embedding [128, 64] block None (embedding)
transformer.h.0.attn.c_attn: linear [192, 64] block 0
transformer.h.0.attn.c_proj: linear [64, 64] block 0
transformer.h.0.mlp.c_fc: linear [256, 64] block 0
transformer.h.0.mlp.c_proj: linear [64, 256] block 0
transformer.h.1.attn.c_attn: linear [192, 64] block 1
transformer.h.1.attn.c_proj: linear [64, 64] block 1
transformer.h.1.mlp.c_fc: linear [256, 64] block 1
transformer.h.1.mlp.c_proj: linear [64, 256] block 1
lm_head: linear [128, 64] block None (output head)
""",
    )


def test_bert_has_a_layer_outside_of_its_blocks_and_no_head() -> None:
    found = layers(captured("bert"))
    assert {name: x.named_only for name, x in found.items() if x.block is None} == {
        "embeddings.word_embeddings": "embedding",
        "embeddings.token_type_embeddings": "embedding",
        "embeddings.position_embeddings": "embedding",
        "pooler.dense": "outside of the repeated blocks",
    }
    assert {x.block for x in found.values()} == {None, 0, 1}


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "opt"])
def test_heads(family: str) -> None:
    """Tied in gemma3 and opt: two layers of their own all the same."""
    found = layers(captured(family))
    roles = {name: x.named_only for name, x in found.items() if x.named_only}
    assert [name for name, role in roles.items() if role == "output head"] == ["lm_head"]
    assert all(x.block is not None for x in found.values() if not x.named_only)
    assert found["lm_head"].kind == "linear"


def test_a_classifiers_last_linear_is_no_output_head() -> None:
    found = layers(captured("vit"))
    assert found["classifier"].named_only == "outside of the repeated blocks"
    assert found["vit.embeddings.patch_embeddings.projection"].kind == "conv2d"


# -- kinds -------------------------------------------------------------------------------------------------------------


def test_blocks() -> None:
    assert_expected_inline(
        table(capture(Blocks(), torch.ones(2, 8))),
        """\
blocks.0.up: linear [12, 8] block 0
blocks.0.down: linear [8, 12] block 0
blocks.1.up: linear [12, 8] block 1
blocks.1.down: linear [8, 12] block 1
head: linear [4, 8] block None (outside of the repeated blocks)
""",
    )


def test_convolutions_of_a_model_without_blocks() -> None:
    assert_expected_inline(
        table(capture(ConvBnRelu(), torch.ones(2, 4, 5, 5))),
        """\
conv: conv2d [8, 4, 3, 3] block None
depthwise: conv2d [8, 1, 3, 3] block None
""",
    )


class Conv1d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv1d(4, 6, 3)
        self.same = nn.Conv1d(6, 6, 3, padding="same")
        self.flat = nn.Conv2d(1, 2, 3, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        return self.flat(self.same(self.plain(x)).unsqueeze(1))


def test_one_dimensional_and_padded_convolutions() -> None:
    assert_expected_inline(
        table(capture(Conv1d(), torch.ones(2, 4, 9))),
        """\
plain: conv1d [6, 4, 3] block None
same: conv1d [6, 6, 3] block None
flat: conv2d [2, 1, 3, 3] block None
""",
    )


def test_experts_at_the_root_have_no_leading_dot() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Parameter(torch.empty(2, 4, 8))

        def forward(self, x: Tensor) -> Tensor:
            _, offsets = route(x[:, :2])
            return torch.ops.graphq.grouped_linear(x, self.proj, offsets)

    assert list(layers(capture(Root(), torch.ones(2, 8)))) == ["0.proj", "1.proj"]


# -- uses --------------------------------------------------------------------------------------------------------------


def test_a_layer_called_twice_is_one_layer_with_two_sites() -> None:
    gm = capture(Twice(), torch.ones(2, 8))
    assert [site.path for site in sites(gm)] == ["shared", "shared"]
    assert list(layers(gm)) == ["shared"]


def test_tied_weights_are_two_layers() -> None:
    gm = capture(Tied(), torch.ones(2, 3, dtype=torch.int64))
    assert {name: x.kind for name, x in layers(gm).items()} == {"embedding": "embedding", "head": "linear"}


class UsedAsBoth(nn.Module):
    """The head reads the embedding's own parameter, before and after the embedding does."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 8)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.table.weight) @ self.table.weight + self.table(tokens), self.table.weight)


def test_a_weight_that_is_an_embedding_anywhere_is_one() -> None:
    """Otherwise its input, token ids, could be given a plan."""
    gm = capture(UsedAsBoth(), torch.ones(2, 8), torch.ones(2, dtype=torch.int64))
    assert [type(site.op).__name__ for site in sites(gm)] == ["Linear", "Embedding", "Linear"]
    (layer,) = layers(gm).values()
    assert (layer.kind, layer.named_only) == ("embedding", "embedding")


class Computed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Linear(8, 8, bias=False, dtype=torch.bfloat16)
        self.scaled = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.low.weight.float()), self.scaled.weight * 2)


def test_weights_are_seen_through_casts_but_not_through_arithmetic() -> None:
    gm = capture(Computed(), torch.ones(2, 8))
    assert list(layers(gm)) == ["low"]
    params = [weight_param(op) for op in ops_of(gm) if isinstance(op, Weighted)]
    assert [param and param.fqn for param in params] == ["low.weight", None]


# -- routers -----------------------------------------------------------------------------------------------------------


def test_a_router_is_the_layer_that_the_offsets_come_from() -> None:
    assert_expected_inline(
        table(capture(MoE(), torch.ones(5, 8))),
        """\
router: linear [4, 8] block None (router)
experts.0.gate_up_proj: expert [12, 8] block None
experts.1.gate_up_proj: expert [12, 8] block None
experts.2.gate_up_proj: expert [12, 8] block None
experts.3.gate_up_proj: expert [12, 8] block None
experts.0.down_proj: expert [8, 6] block None
experts.1.down_proj: expert [8, 6] block None
experts.2.down_proj: expert [8, 6] block None
experts.3.down_proj: expert [8, 6] block None
""",
    )


class PlainRouter(nn.Module):
    """A router that is a product, not a layer: the layer before it is no router."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(8, 8)
        self.scores = nn.Parameter(torch.empty(8, 2))
        self.proj = nn.Parameter(torch.empty(2, 4, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        order, offsets = route(h @ self.scores)
        return torch.ops.graphq.grouped_linear(h[order], self.proj, offsets)


def test_layers_before_a_router_that_is_no_layer_are_ordinary() -> None:
    found = layers(capture(PlainRouter(), torch.ones(5, 8)))
    assert {name: x.named_only for name, x in found.items()} == {"before": "", "0.proj": "", "1.proj": ""}


@pytest.mark.parametrize(
    ("layer", "x", "kind", "shape"),
    [
        (nn.Conv3d(4, 6, (1, 2, 3), groups=2), (1, 4, 5, 5, 5), "conv3d", (6, 2, 1, 2, 3)),
        (nn.Conv3d(4, 6, 3, padding="same"), (1, 4, 5, 5, 5), "conv3d", (6, 4, 3, 3, 3)),
        (nn.ConvTranspose1d(4, 6, 3), (1, 4, 5), "conv_transpose1d", (6, 4, 3)),
        (nn.ConvTranspose2d(4, 6, (2, 3), groups=2), (1, 4, 5, 5), "conv_transpose2d", (6, 2, 2, 3)),
        (nn.ConvTranspose3d(4, 4, 2, groups=4), (1, 4, 5, 5, 5), "conv_transpose3d", (4, 1, 2, 2, 2)),
    ],
)
def test_convolutions_of_every_kind(layer: nn.Module, x: tuple[int, ...], kind: str, shape: tuple[int, ...]) -> None:
    found = layers(capture(nn.Sequential(layer), torch.ones(2, *x[1:])))
    assert [(name, one.kind, one.shape, one.bias, one.reads_state) for name, one in found.items()] == [
        ("0", kind, shape, True, False)  # outputs first, whatever the layout
    ]


def test_a_bag_of_embeddings_is_one() -> None:
    found = layers(capture(nn.Sequential(nn.EmbeddingBag(10, 8)), torch.ones(3, 4, dtype=torch.int64)))
    assert [(name, one.kind, one.shape, one.named_only) for name, one in found.items()] == [
        ("0", "embedding", (10, 8), "embedding")
    ]
