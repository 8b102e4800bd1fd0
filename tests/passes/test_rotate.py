"""Residual streams and heads are in another basis, and the function is the same; or a reason says what is in the way."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from graphq.capture.hugging_face import capture_pretrained
from graphq.ir.pipeline import Pipeline
from graphq.ir.views import ops_of
from graphq.numerics.hadamard import rotation
from graphq.passes.fold_norms import FoldNorms
from graphq.passes.rotate import Rotate
from graphq.passes.rotate_online import RotateOnline
from graphq.passes.untie import Untie
from graphq.state import put_tensor, tensor_of
from tests.decoder import RMS, TOKENS, Decoder
from tests.graphs import assert_vals, run, targets
from tests.lifted import assert_same_function, lifted, run_lifted
from tests.models import Blocks, capture, random_inputs, tiny
from tests.passes.test_fold_norms import perturbed

OFFLINE: dict[str, Any] = {"r1": False, "r2": False}


def rotate(gm: fx.GraphModule, **options: Any) -> tuple[int, list[str]]:
    """The number of changes, and what stays as it is, and why."""
    notes: list[str] = []
    counts = Pipeline([Rotate(note=notes.append, **options)], strict=True).run(gm)
    return counts["rotate"], [note.removeprefix("rotate: ") for note in notes]


def decoder(*, folded: bool = True, **options: Any) -> fx.GraphModule:
    """A small decoder in float64."""
    gm = capture(Decoder(**options).double(), TOKENS)
    if folded:
        FoldNorms().run(gm)
    return gm


def logits(gm: fx.GraphModule) -> Tensor:
    return run(gm, TOKENS)


def assert_same(made: Tensor, expected: Tensor) -> None:
    assert expected.dtype == torch.float64
    assert (made - expected).abs().max() <= 1e-10 * expected.abs().max()


# R1: parameters changed and layer norms replaced; R2: parameters changed. Why R1 is refused, if it is.
FAMILIES = [
    ("llama", 16, 4, []),
    ("qwen3", 16, 4, []),
    ("mixtral", 18, 4, []),
    ("deepseek", 18, 4, []),
    ("opt", 24, 6, []),
    ("gpt2", 20, 6, []),
    (
        "gemma3",
        0,
        4,
        [
            f"r1: model.layers.{i}.post_{part}_layernorm.weight: its gain differs from channel to channel"
            for i in (0, 1)
            for part in ("attention", "feedforward")
        ],
    ),
    (
        "bert",
        0,
        6,
        [
            f"r1: {place}.LayerNorm.{name}: it is not folded into the layers that read the norm"
            for place in (
                "embeddings",
                *(f"encoder.layer.{i}.{p}" for i in (0, 1) for p in ("attention.output", "output")),
            )
            for name in ("weight", "bias")
        ]
        + ["r1: last_hidden_state: the caller gets it"],
    ),
    ("vit", 0, 6, ["r1: vit.embeddings.patch_embeddings: aten.transpose.int makes what the stream holds"]),
]


@pytest.mark.parametrize(("family", "r1", "r2", "reasons"), FAMILIES, ids=[family[0] for family in FAMILIES])
def test_families(family: str, r1: int, r2: int, reasons: list[str]) -> None:
    before = lifted(perturbed(family))
    FoldNorms().run(before)
    inputs = random_inputs(before)
    stream = copy.deepcopy(before)
    assert rotate(stream, r2=False) == (r1, reasons)
    assert_same_function(before, stream, inputs, 1e-10)  # caches too
    heads = copy.deepcopy(before)
    assert rotate(heads, r1=False) == (r2, [])
    for old, new in zip(run_lifted(before, inputs)[:1], run_lifted(heads, inputs)[:1], strict=True):
        assert (new - old).abs().max() <= 1e-10 * old.abs().max()
    changed = [n for n, t in heads.state_dict().items() if not torch.equal(t, tensor_of(before, n))]
    assert len(changed) == r2


@pytest.mark.parametrize("family", ["gpt2", "deepseek"])
def test_vals_and_dtypes(family: str) -> None:
    gm = perturbed(family)
    FoldNorms().run(gm)
    inputs, shapes = random_inputs(gm), {name: (t.dtype, t.shape) for name, t in gm.state_dict().items()}
    before = run(gm, *inputs)
    assert rotate(gm)[1] == []
    RotateOnline(r3=True, r4=True).run(gm)
    assert_vals(gm, *inputs)
    assert {n: (t.dtype, t.shape) for n, t in gm.state_dict().items() if "hadamard" not in n}.items() <= shapes.items()
    torch.testing.assert_close(run(gm, *inputs), before, rtol=1e-4, atol=1e-4)  # in float32
    assert "aten.layer_norm" not in targets(gm)


@pytest.mark.parametrize("family", ["llama", "deepseek"])
def test_caches_go_on_in_the_new_basis(family: str) -> None:
    """Two steps, each fed what the one before it returned."""
    before = lifted(perturbed(family))
    after = copy.deepcopy(before)
    FoldNorms().run(after)
    rotate(after)
    RotateOnline(r3=True, r4=True).run(after)
    tokens = random_inputs(before, 2, 7)[0]
    found: list[Tensor] = []
    for gm in (before, after):
        gm.recompile()
        caches = [x.double() for x in random_inputs(before, 2, 5)[3:]]
        for start, end in ((0, 5), (5, 7)):
            positions = torch.arange(start, end).expand(2, -1)
            mask = torch.ones(2, end, dtype=torch.int64)
            y, *caches = gm(tokens[:, start:end], mask, positions, *caches)
            found.append(y)
    assert_same(found[2], found[0])
    assert_same(found[3], found[1])


def test_a_tied_head() -> None:
    gm = capture_pretrained(tiny("gpt2"))
    before = copy.deepcopy(gm)
    assert FoldNorms().run(gm) == 0  # a fresh model's gains are ones
    assert rotate(gm, r2=False) == (
        0,
        [
            "r1: transformer.wte.weight: it is tied to lm_head.weight",
            "r1: lm_head.weight: it is tied to transformer.wte.weight",
        ],
    )
    assert Untie().run(gm) == 1
    assert rotate(gm, r2=False) == (20, [])
    table, head = (tensor_of(gm, name) for name in ("transformer.wte.weight", "lm_head.weight"))
    assert not torch.allclose(table, head, atol=1e-3)  # one is centred, too
    torch.testing.assert_close(run(gm, *random_inputs(gm)), run(before, *random_inputs(gm)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["hadamard", "random_hadamard", "orthogonal"])
@pytest.mark.parametrize("options", [{}, {"block_size": 4}, {"seed": 3}])
def test_kinds(kind: str, options: dict[str, Any]) -> None:
    gm = decoder()
    before, old = logits(gm), tensor_of(gm, "embedding.weight").clone()
    assert rotate(gm, kind=kind, **options) == (9, [])  # R2's are among R1's
    assert_same(logits(gm), before)
    again = decoder()
    rotate(again, kind=kind, **options)
    new = tensor_of(gm, "embedding.weight")
    assert torch.equal(new, tensor_of(again, "embedding.weight"))
    blocks = [(old[:, i : i + 4].norm(dim=1) - new[:, i : i + 4].norm(dim=1)).abs().max() < 1e-12 for i in (0, 4)]
    assert all(blocks) == ("block_size" in options)
    other = decoder()
    rotate(other, kind=kind)
    assert torch.equal(new, tensor_of(other, "embedding.weight")) == (
        not options or (kind, options) == ("hadamard", {"seed": 3})
    )


def test_outliers_are_gone() -> None:
    """What rotations are for: one large channel is spread over all of them."""
    gm = decoder()
    put_tensor(gm, "embedding.weight", nn.Parameter(torch.eye(16, 8).double() * 100, requires_grad=False))
    rotate(gm, r2=False)
    made = tensor_of(gm, "embedding.weight")[:8].abs()
    torch.testing.assert_close(made, torch.full_like(made, 100 / 8**0.5), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "options", [{"norm": lambda n: RMS(n, 1.0)}, {"norm": nn.RMSNorm}, {"norm": nn.LayerNorm}, {"bias": True}]
)
def test_norms(options: dict[str, Any]) -> None:
    gm = decoder(**options)
    before = logits(gm)
    assert rotate(gm)[1] == []
    assert_same(logits(gm), before)
    assert_vals(gm, TOKENS)


def test_layer_norms_of_halves_are_taken_in_float32() -> None:
    gm = capture(Decoder(norm=nn.LayerNorm).bfloat16(), TOKENS)
    FoldNorms().run(gm)
    before = logits(gm)
    assert rotate(gm) == (9 + 1 + 3, [])  # nine weights, v's new bias, three norms
    assert [t for t in targets(gm) if t == "aten.rsqrt"] == ["aten.rsqrt"] * 3
    assert {op.val.dtype for op in ops_of(gm) if op.node.target == torch.ops.aten.rsqrt.default} == {torch.float32}
    assert_vals(gm, TOKENS)
    assert logits(gm).dtype == torch.bfloat16
    assert (logits(gm) - before).abs().max() < 0.1 * before.abs().max()


def test_nothing_to_rotate() -> None:
    gm = capture(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), torch.ones(2, 8))
    assert rotate(gm) == (0, ["r1: no linear reads a sum of computed values", "r2: no attention is found"])


def test_a_sum_with_a_parameter_is_no_residual_add() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.shift = nn.Linear(8, 8), nn.Linear(8, 8), nn.Parameter(torch.empty(8))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) + self.shift)

    reason = "r1: no linear reads a sum of computed values"
    assert rotate(capture(Shifted(), torch.ones(2, 8)), r2=False) == (0, [reason])


def test_unfolded_norms() -> None:
    gm = decoder(folded=False)
    assert rotate(gm, r2=False) == (
        0,
        [f"r1: norm_{i}.weight: its gain differs from channel to channel" for i in (1, 2, 3)],
    )


def test_sizes_without_a_matrix() -> None:
    gm = decoder()
    assert rotate(gm, r2=False, block_size=3) == (0, ["r1: its 8 channels are no multiple of 3"])
    gm = capture(Decoder().double(), TOKENS)
    assert rotate(gm, r1=False, r2=False) == (0, [])


def layer_norm(**twists: Any) -> dict[str, Any]:
    return {"norm": nn.LayerNorm, **twists}


# For each guard, a decoder that differs there alone, and the reasons.
NEAR_MISSES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "activation": ({"embedded": lambda m, x: F.relu(x)}, ["relu: aten.relu makes what the stream holds"]),
    "written through an activation": (
        {"written": lambda m, x: F.gelu(x)},
        ["gelu: aten.gelu makes what the stream holds"],
    ),
    "returned": ({"returned": ("last",)}, ["output_1: the caller gets it"]),
    "one number added to all channels": ({"last": lambda m, x: x + 1.0}, ["add_4: aten.add.Tensor reads the stream"]),
    "one number of each row added to all channels": (
        {"last": lambda m, x: x + x[..., :1]},
        ["slice_1: aten.slice.Tensor reads the stream", "add_4: aten.add.Tensor reads the stream"],
    ),
    "channels scaled apart": ({"last": lambda m, x: x * m.table}, ["table: its gain differs from channel to channel"]),
    "divided by": ({"last": lambda m, x: 1.0 / x}, ["reciprocal: aten.reciprocal reads the stream"]),
    "a divisor": (
        {"last": lambda m, x: x + x.pow(2).mean(-1, keepdim=True) / x},
        ["div: aten.div.Tensor reads the stream", "div: aten.div.Tensor makes what the stream holds"],
    ),
    "the mean": (
        {"last": lambda m, x: x - x.mean(-1, keepdim=True)},
        ["mean_2: aten.mean.dim reads the stream", "sub: aten.sub.Tensor reads the stream"],
    ),
    "the square's sum": (
        {"last": lambda m, x: x * x.pow(2).sum(-1, keepdim=True)},
        ["pow_3: squares of the stream are read apart from their mean"],
    ),
    "the square's mean of tokens": (
        {"last": lambda m, x: x * x.pow(2).mean(1, keepdim=True)},
        ["pow_3: squares of the stream are read apart from their mean", "mul_5: aten.mul.Tensor reads the stream"],
    ),
    "the cube's mean": (
        {"last": lambda m, x: x * x.pow(3).mean(-1, keepdim=True)},
        ["pow_3: aten.pow.Tensor_Scalar reads the stream"],
    ),
    "the square": (
        {"last": lambda m, x: x + x * x},
        [
            "mul_5: squares of the stream are read apart from their mean",
            "mul_5: aten.mul.Tensor makes what the stream holds",
        ],
    ),
    "flipped": ({"last": lambda m, x: x.flip(-1)}, ["flip: aten.flip reads the stream"]),
    "rolled": (
        {"last": lambda m, x: torch.cat([x[..., 1:], x[..., :1]], -1)},
        ["slice_1: aten.slice.Tensor reads the stream", "slice_2: aten.slice.Tensor reads the stream"],
    ),
    "indexed": ({"last": lambda m, x: x[:, :, torch.arange(8)]}, ["index: aten.index.Tensor reads the stream"]),
    "transposed": (
        {"last": lambda m, x: x.transpose(1, 2).transpose(1, 2)},
        ["transpose_4: aten.transpose.int reads the stream"],
    ),
    "permuted": (
        {"last": lambda m, x: x.permute(0, 2, 1).permute(0, 2, 1)},
        ["permute: aten.permute reads the stream"],
    ),
    "in halves": (
        {"last": lambda m, x: x.unflatten(-1, (2, 4)).flatten(2)},
        ["unflatten: aten.unflatten.int reads the stream"],
    ),
    "multiplied": ({"last": lambda m, x: x @ m.extra.weight}, ["matmul: aten.matmul reads the stream"]),
    "a weight that something else reads": (
        {"hidden": lambda m, x: x * m.o.weight.sum()},
        ["o.weight: sum_1 reads it, too"],
    ),
    "an embedding that something else reads": (
        {"hidden": lambda m, x: x * m.embedding.weight.sum()},
        ["embedding.weight: sum_1 reads it, too"],
    ),
    "a bias that something else reads": (
        {"bias": True, "hidden": lambda m, x: x * m.o.bias.sum()},
        ["o.bias: sum_1 reads it, too"],
    ),
    "a layer used twice": ({"written": lambda m, x: m.o(x)}, ["o.weight: o reads it, too"]),
    "a layer that reads and, elsewhere, writes": (
        {"last": lambda m, x: x + m.extra(F.silu(m.extra(x)))},
        ["extra.weight: it is read in several ways"],
    ),
    "a computed weight": (
        {"last": lambda m, x: x + F.linear(F.silu(m.extra(x)), m.extra_2.weight * 2)},
        ["linear_8: its weight or bias is computed"],
    ),
    "a computed bias": (
        {"last": lambda m, x: x + F.linear(F.silu(m.extra(x)), m.extra_2.weight, m.table[0] * 2)},
        ["extra_2: its weight or bias is computed"],
    ),
    "a computed table": (
        {"embedded": lambda m, x: x + F.embedding(m.seen_tokens, m.table.expand(16, 8) * 2)},
        ["embedding_1: its weight or bias is computed"],
    ),
    "a layer norm that something else reads": (
        layer_norm(returned=("normed",)),
        [
            "norm_2.weight: it is not folded into the layers that read the norm",
            "norm_2.bias: it is not folded into the layers that read the norm",
            "output_1: the caller gets it",
        ],
    ),
    "a layer norm, and a linear that reads the stream itself": (
        layer_norm(last=lambda m, x: x + m.extra_2(F.silu(m.extra(x)))),
        ["extra: it reads the stream without a layer norm"],
    ),
    "a layer norm, and an RMS norm": (
        layer_norm(last=lambda m, x: x * x.pow(2).mean(-1, keepdim=True)),
        ["pow_1: it reads the stream without a layer norm"],
    ),
    "a layer norm of two axes": (
        layer_norm(last=lambda m, x: x + F.layer_norm(x, [5, 8])),
        ["layer_norm_2: it is not of the width of the stream"],
    ),
    "a table that something else reads": (
        {"embedded": lambda m, x: x + m.table, "hidden": lambda m, x: x * m.table.sum()},
        ["table: sum_1 reads it, too", "sum_1: aten.sum reads the stream"],
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name: str) -> None:
    options, reasons = NEAR_MISSES[name]
    gm = decoder(**options)
    assert rotate(gm, r2=False) == (0, [f"r1: {reason}" for reason in reasons])


# What does not get in the way.
COMMUTING: dict[str, dict[str, Any]] = {
    "scaled": {"embedded": lambda m, x: x * 8**0.5, "last": lambda m, x: -x / 3},
    "scaled by a tensor": {"last": lambda m, x: x * m.table[0, :1].exp()},
    "scaled row by row": {"last": lambda m, x: x * (x.pow(2).mean(-1, keepdim=True) + 1)},
    "divided row by row": {"last": lambda m, x: x / (x * x).mean(-1, keepdim=True).sqrt()},
    "doubled": {"last": lambda m, x: x + x - 3 * x},
    "moved": {"last": lambda m, x: x.transpose(0, 1).permute(1, 0, 2).unsqueeze(1)[:, 0].clone()},
    "of rows": {"last": lambda m, x: x.reshape(-1, 8)[torch.arange(1)].view(1, 1, 8).expand(x.shape) + x},
    "concatenated": {"last": lambda m, x: torch.cat([x[:, :1], x[:, 1:]], 1)},
    "summed": {"last": lambda m, x: x + x.sum(1, keepdim=True) + x.mean([0, 1], keepdim=True)},
    "scattered": {"last": lambda m, x: torch.zeros_like(x).index_add(1, torch.arange(x.shape[1]), x)},
    "a table of positions": {"embedded": lambda m, x: x + m.table},
    "a layer that is used twice alike": {"last": lambda m, x: x + m.extra_2(F.silu(m.extra(x)) + F.silu(m.extra(-x)))},
    "cast": {"last": lambda m, x: x.to(torch.float32).to(torch.float64)},
    "a layer norm's output added to what it reads": layer_norm(last=lambda m, x: x + F.layer_norm(x, [8])),
    "a linear that reads the stream and writes to it": {"last": lambda m, x: x + m.extra(x)},
    "a linear that reads the stream itself": {"last": lambda m, x: x + m.extra_2(F.silu(m.extra(x)))},
}


@pytest.mark.parametrize("name", COMMUTING)
def test_what_does_not_get_in_the_way(name: str) -> None:
    gm = decoder(**COMMUTING[name])
    before = logits(gm)
    count, reasons = rotate(gm)
    assert reasons == []
    assert count >= 9
    made = logits(gm)
    assert (made - before).abs().max() <= (1e-5 if name == "cast" else 1e-10) * before.abs().max()


def test_an_input_in_the_stream() -> None:
    assert rotate(capture(Blocks(), torch.ones(2, 8)), r2=False) == (0, ["r1: x: the caller gives it"])


VALUES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "an activation": (
        {"value": lambda m, x: F.relu(x)},
        ["relu: aten.relu makes what the stream holds"],
    ),
    "an activation behind": (
        {"attended": lambda m, x: F.relu(x)},
        ["relu: aten.relu reads the stream"],
    ),
    "returned": ({"returned": ("value",)}, ["output_1: the caller gets it"]),
    "returned behind": ({"returned": ("attended",)}, ["output_1: the caller gets it"]),
    "scaled apart": (
        {"value": lambda m, x: x * m.table[..., :4]},
        ["mul_2: aten.mul.Tensor makes what the stream holds"],
    ),
    "flipped": (
        {"attended": lambda m, x: x.flip(-1)},
        ["flip: aten.flip reads the stream"],
    ),
    "a layer norm": ({"attended": lambda m, x: F.layer_norm(x, [4])}, ["layer_norm: a layer norm reads the values"]),
    "v read elsewhere": ({"hidden": lambda m, x: x * m.v.weight.sum()}, ["v.weight: sum_1 reads it, too"]),
    "v's bias read elsewhere": (
        {"bias": True, "hidden": lambda m, x: x * m.v.bias.sum()},
        ["v.bias: sum_1 reads it, too"],
    ),
    "o read elsewhere": ({"hidden": lambda m, x: x * m.o.weight.sum()}, ["o.weight: sum_1 reads it, too"]),
    "the values are keys": (
        {"value": lambda m, x: m.seen["key"]},
        ["scaled_dot_product_attention: aten.scaled_dot_product_attention reads the stream"],
    ),
    "no linear makes them": (
        {"value": lambda m, x: torch.zeros_like(x)},
        ["reshape: no linear makes or reads the values"],
    ),
}


@pytest.mark.parametrize("name", VALUES)
def test_near_misses_of_values(name: str) -> None:
    options, reasons = VALUES[name]
    gm = decoder(**options)
    assert rotate(gm, r1=False) == (0, [f"r2: {reason}" for reason in reasons])


@pytest.mark.parametrize(
    "options",
    [
        {"bias": True},
        {"value": lambda m, x: x * 2 + x.mean(2, keepdim=True)},
        {"attended": lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1)},
        {"attended": lambda m, x: F.rms_norm(x, [4])},
    ],
)
def test_values(options: dict[str, Any]) -> None:
    gm = decoder(**options)
    before = logits(gm)
    old = {name: tensor.clone() for name, tensor in gm.state_dict().items()}
    assert rotate(gm, r1=False, seed=5) == (3 if "bias" in options else 2, [])
    assert_same(logits(gm), before)
    made = rotation(4, "random_hadamard", 5 + (1 << 16))
    assert made is not None
    q = made.matrix()
    torch.testing.assert_close(tensor_of(gm, "v.weight"), q.T @ old["v.weight"], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(
        tensor_of(gm, "o.weight"), old["o.weight"] @ torch.block_diag(q, q), rtol=1e-13, atol=1e-13
    )


class Attention(nn.Module):
    """One attention as it is written by hand, whose projections are one linear. ``cut``: q, k and v of what it gives."""

    def __init__(self, cut: Any, width: int = 8) -> None:
        super().__init__()
        self.qkv, self.o, self.cut = nn.Linear(8, 3 * width), nn.Linear(width, 8), cut
        self.width = width

    def forward(self, x: Tensor) -> Any:
        y = self.qkv(x)
        q, k, v = self.cut(y, self.width)
        scores = torch.softmax(q @ k.transpose(-1, -2) / 3, -1)
        return self.o(scores @ v)


def split(y: Tensor, n: int) -> Any:
    return y.split(n, -1)


def chunk(y: Tensor, n: int) -> Any:
    return y.chunk(3, -1)


def slices(y: Tensor, n: int) -> Any:
    return y[..., :n], y[..., n : 2 * n], y[..., 2 * n :]


def moved_slices(y: Tensor, n: int) -> Any:
    return slices(y.unsqueeze(0).transpose(0, 1).transpose(0, 1)[0] * 2, n)


def overlapping(y: Tensor, n: int) -> Any:
    return y[..., :n], y[..., n + 1 : 2 * n + 1], y[..., 2 * n :]


def read_whole(y: Tensor, n: int) -> Any:
    return y[..., :n] + y.sum(), y[..., n : 2 * n], y[..., 2 * n :]


def through_an_activation(y: Tensor, n: int) -> Any:
    return slices(F.relu(y), n)


def values_are_keys(y: Tensor, n: int) -> Any:
    return y[..., :n], y[..., 2 * n :], y[..., 2 * n :]


def normed_whole(y: Tensor, n: int) -> Any:
    return slices(F.layer_norm(y, [3 * n]), n)


@pytest.mark.parametrize("cut", [split, chunk, slices, moved_slices])
def test_fused_values(cut: Any) -> None:
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gm = capture(Attention(cut).double(), x)
    before, old = run(gm, x), tensor_of(gm, "qkv.weight").clone()
    assert rotate(gm, r1=False) == (3, [])
    assert_same(run(gm, x), before)
    same = (tensor_of(gm, "qkv.weight") == old).all(1)
    assert same.tolist() == [True] * 16 + [False] * 8


@pytest.mark.parametrize(
    ("cut", "reasons"),
    [
        (overlapping, ["slice_2: aten.slice.Tensor reads the stream"]),
        (read_whole, ["sum_1: aten.sum reads the stream"]),
        (
            through_an_activation,
            ["relu: aten.relu makes what the stream holds"],
        ),
        (values_are_keys, ["transpose: aten.transpose.int reads the stream"]),
        (
            normed_whole,
            [
                "layer_norm: aten.layer_norm makes what the stream holds",
            ],
        ),
    ],
)
def test_near_misses_of_fused_values(cut: Any, reasons: list[str]) -> None:
    gm = capture(Attention(cut), torch.ones(2, 5, 8))
    assert rotate(gm, r1=False) == (0, [f"r2: {reason}" for reason in reasons])


def test_a_head_without_a_matrix() -> None:
    gm = capture(Attention(split, 6).double(), torch.ones(2, 5, 8).double())
    reason = "r2: graphq knows no Hadamard matrix of size 6; kind orthogonal has one"
    assert rotate(gm, r1=False) == (0, [reason])
    assert rotate(gm, r1=False, kind="orthogonal") == (3, [])
