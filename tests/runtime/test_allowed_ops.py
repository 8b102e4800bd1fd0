"""The ops that artifacts may hold: they exist, change nothing, are what modules compute, and check their arguments."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from graphq.capture.modules import capture_module
from graphq.errors import GraphqError
from graphq.runtime import allowed_ops, checked_ops
from graphq.runtime.allowed_ops import OVERLOADS
from graphq.runtime.graph_json import graph_from_json, graph_to_json, refusal
from tests.models import FAMILIES, captured
from tests.runtime.functions import EXPRESSIONS

aten: Any = torch.ops.aten
_DRAW = torch.Generator().manual_seed(0)
X = torch.randn(2, 8, generator=_DRAW)
INPUTS = (
    X,
    *(torch.randn(shape, generator=_DRAW) for shape in ((2, 4, 8), (2, 4, 8, 8), (2, 4, 6, 6, 6))),
    torch.randint(0, 8, (2, 4), generator=_DRAW),
    X > 0,
)


class Functions(nn.Module):
    """The results of a group of expressions."""

    def __init__(self, group: str) -> None:
        super().__init__()
        self.register_buffer("W", torch.randn(16, 8, generator=torch.Generator().manual_seed(1)))
        text = EXPRESSIONS[group].replace("\n", " ").replace(";", ",")
        self.run = eval(f"lambda x, v, im, vol, ids, b, W: ({text},)", {"T": torch, "F": F, "nn": nn})  # noqa: S307

    def forward(self, x: Tensor, v: Tensor, im: Tensor, vol: Tensor, ids: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return self.run(x, v, im, vol, ids, b, self.W)


def captured_functions(group: str) -> fx.GraphModule:
    """The graph of a group of expressions."""
    return capture_module(Functions(group).eval(), INPUTS)


def test_every_row_is_an_op_that_changes_nothing() -> None:
    rows = Path(allowed_ops.__file__).with_suffix(".txt").read_text(encoding="utf-8").splitlines()
    assert [row.split()[0] for row in rows] == sorted(OVERLOADS)
    for name, overloads in OVERLOADS.items():
        for overload in overloads.split():
            schema = getattr(getattr(aten, name), overload)._schema
            assert not schema.is_mutable, name
            assert not any("str" in str(a.type) and "file" in a.name for a in schema.arguments), name


@pytest.mark.parametrize("group", EXPRESSIONS)
def test_what_modules_compute_is_stored_and_read_back(group: str) -> None:
    gm = captured_functions(group)
    assert [why for node in gm.graph.nodes if (why := refusal(node)) is not None] == []
    read = graph_from_json(graph_to_json(gm), dict(gm.state_dict()))
    for ours, theirs in zip(read(*INPUTS), gm(*INPUTS), strict=True):
        assert torch.equal(torch.nan_to_num(ours), torch.nan_to_num(theirs))
        assert ours.dtype == theirs.dtype


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_what_families_compute_is_stored(family: str) -> None:
    found = {str(node.target) for node in captured(family).graph.nodes if refusal(node) is not None}
    assert found <= {"transformers.grouped_mm_fallback.default"}  # which becomes graphq's own op


@pytest.mark.parametrize("mutations", [3, pytest.param(300, marks=pytest.mark.slow)])
def test_no_op_reaches_beyond_its_tensors(mutations: int) -> None:
    command = [sys.executable, "-m", "tests.runtime.guarded", str(mutations), "1"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=3000)
    assert done.returncode == 0, done.stderr.splitlines()[-1]
    assert int(done.stdout) > 200 * mutations  # of 600


# -- the ops that trust their arguments --------------------------------------------------------------------------------


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


@pytest.mark.parametrize(("short", "extra"), [(i, shape) for i in range(1, 5) for shape in ((2,), (4, 1), (0,))])
def test_batch_norm_takes_an_element_for_each_channel(short: int, extra: tuple[int, ...]) -> None:
    args: list[Any] = [ones(2, 4, 3, 3) * 2, *(ones(4) for _ in range(4)), 0.1, 1e-5]
    theirs = aten._native_batch_norm_legit_no_training(*args)
    assert all(torch.equal(a, b) for a, b in zip(checked_ops.native_batch_norm(*args), theirs, strict=True))
    args[short] = ones(*extra)
    with pytest.raises(GraphqError, match="not one element for each of 4 channels"):
        checked_ops.native_batch_norm(*args)


def recurrent(kind: str, **options: Any) -> tuple[Any, list[Any]]:
    """The substitute of a recurrent layer and arguments that fit."""
    layer = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn_tanh": nn.RNN}[kind](8, 6, **options)
    layers = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    state = ones(layers, 3, options.get("proj_size", 6))
    hx: Any = [state, ones(layers, 3, 6)] if kind == "lstm" else state
    x = ones(3, 5, 8) if options.get("batch_first") else ones(5, 3, 8)
    weights = [w.detach() for w in layer.parameters()]
    flags = [options.get("bias", True), options.get("num_layers", 1), 0.0, False]
    flags += [options.get("bidirectional", False), options.get("batch_first", False)]
    return checked_ops.SUBSTITUTES[f"aten.{kind}.input"], [x, hx, weights, *flags]


@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}, {"bias": False}, {"proj_size": 4}],
    ids=str,
)
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn_tanh"])
def test_recurrent_layers_take_weights_that_fit(kind: str, options: dict[str, Any]) -> None:
    if "proj_size" in options and kind != "lstm":
        return
    op, args = recurrent(kind, **options)
    theirs = getattr(aten, kind).input(*args)
    assert all(torch.equal(a, b) for a, b in zip(op(*args), theirs, strict=True))
    for i, weight in enumerate(args[2]):
        for wrong in (weight[:-1], weight.unsqueeze(0), weight.double()):
            weights = [*args[2][:i], wrong, *args[2][i + 1 :]]
            with pytest.raises(GraphqError, match="recurrent"):
                op(args[0], args[1], weights, *args[3:])
    for place, wrong in ((0, args[0][..., :-1]), (0, args[0][0]), (2, args[2][:-1]), (4, 7), (7, not args[7])):
        with pytest.raises(GraphqError, match="recurrent"):
            op(*args[:place], wrong, *args[place + 1 :])


def test_windows_and_modes_in_range() -> None:
    assert torch.equal(
        checked_ops.col2im(ones(2, 12, 12), [4, 5], [2, 2], [1, 1], [0, 0], [1, 1]).sum(), torch.tensor(288.0)
    )
    assert checked_ops.im2col(ones(2, 4, 8, 8), [3, 3], [1, 1], [0, 0], [1, 1]).shape == (2, 36, 36)
    for wrong in ([1 << 31, 0], [-1, 0]):
        with pytest.raises(GraphqError, match="out of range"):
            checked_ops.col2im(ones(2, 12, 12), [4, 5], [2, 2], [1, 1], wrong, [1, 1])
        with pytest.raises(GraphqError, match="out of range"):
            checked_ops.im2col(ones(2, 4, 8, 8), [3, 3], [1, 1], wrong, [1, 1])
    for modes in ((3, 0), (0, 3), (-1, 0)):
        with pytest.raises(GraphqError, match="there is no mode"):
            checked_ops.grid_sampler(ones(1, 1, 2, 2), ones(1, 2, 2, 2), *modes, False)


def test_one_dimensional_pooling_takes_sizes_that_its_arithmetic_holds() -> None:
    x = torch.arange(24.0).reshape(1, 2, 12)
    assert torch.equal(checked_ops.max_pool1d(x, [3]), F.max_pool1d(x, 3))
    args: list[Any] = [[3], [2], [1], [2]]
    assert torch.equal(checked_ops.max_pool1d(x, *args, ceil_mode=True), aten.max_pool1d(x, *args, True))
    for place in range(4):  # the kernel's size, which is also the stride that is not given, reads beyond the tensor
        for wrong in (2**63 - 1, -1, 2**31):
            changed: list[Any] = [[wrong] if i == place else given for i, given in enumerate(args)]
            with pytest.raises(GraphqError, match="out of range"):
                checked_ops.max_pool1d(x, *changed[:4])


def attend(*shapes: tuple[int, ...], **options: Any) -> tuple[Any, Any]:
    """What the substitute and torch's own give for tensors of these shapes, the fourth that of the mask."""
    tensors = [torch.rand(shape, generator=torch.Generator().manual_seed(0)) for shape in shapes]
    op = aten.scaled_dot_product_attention.default
    return checked_ops.SUBSTITUTES[str(op)](*tensors, **options), op(*tensors, **options)


Q, KV = (1, 2, 3, 8), (1, 2, 5, 8)


@pytest.mark.parametrize(
    "shapes",
    [
        ((3, 8), (5, 8), (5, 8)),
        (Q, KV, KV),
        (Q, KV, (1, 2, 5, 4)),  # values of another width than keys
        *((Q, KV, KV, mask) for mask in ((3, 5), (1, 5), (3, 1), (1, 1, 3, 5), (1, 2, 1, 5))),
        ((4, 2, 3, 8), KV, KV),  # a batch of queries for one of keys
        (Q, (4, 2, 5, 8), (4, 2, 5, 8), (4, 1, 3, 5)),
        (Q, (2, 5, 8), (2, 5, 8)),
        ((0, 2, 3, 8), (0, 2, 5, 8), (0, 2, 5, 8)),
    ],
    ids=str,
)
def test_attention_takes_what_fits(shapes: tuple[tuple[int, ...], ...]) -> None:
    assert torch.equal(*attend(*shapes))
    if len(shapes) == 3:
        assert torch.equal(*attend(*shapes, is_causal=True, scale=0.5))


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_takes_grouped_heads(heads: int) -> None:
    assert torch.equal(*attend((2, 4, 3, 8), *[(2, heads, 5, 8)] * 2, (3, 5), enable_gqa=True))


@pytest.mark.parametrize(
    ("shapes", "text"),
    [
        ((Q, (1, 2, 5, 8), (1, 2, 60, 8)), "do not fit"),  # reads beyond the keys
        ((Q, (1, 2, 60, 8), (1, 2, 5, 8)), "do not fit"),
        ((Q, (1, 2, 5, 7), KV), "do not fit"),
        ((Q, (1, 3, 5, 8), (1, 3, 5, 8)), "do not fit"),
        (((8,), (5, 8), (5, 8)), "do not fit"),
        ((Q, (8,), (5, 8)), "do not fit"),
        ((Q, (5, 8), (8,)), "do not fit"),
        *(
            ((Q, KV, KV, mask), "a mask")
            for mask in ((3, 4), (2, 5), (4,), (2, 1, 3, 5), (1, 3, 3, 5), (1, 1, 1, 3, 5))
        ),
    ],
    ids=str,
)
def test_attention_takes_no_other_lengths(shapes: tuple[tuple[int, ...], ...], text: str) -> None:
    with pytest.raises(GraphqError, match=text):
        attend(*shapes)


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((2, 4, 3, 8), (2, 3, 5, 8), (2, 3, 5, 8)),
        ((2, 4, 3, 8), (2, 2, 5, 8), (2, 4, 5, 8)),
        ((2, 4, 3, 8), (1, 2, 5, 8), (1, 2, 5, 8)),
        ((2, 4, 3, 8), (2, 0, 5, 8), (2, 0, 5, 8)),
        ((3, 8), (2, 5, 8), (2, 5, 8)),
    ],
    ids=str,
)
def test_attention_takes_no_other_groups(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> None:
    with pytest.raises(GraphqError, match="do not fit"):
        attend(q, k, v, enable_gqa=True)


@pytest.mark.parametrize("op", ["_weight_norm", "_weight_norm_interface"])
def test_weight_norm_takes_a_norm_for_each_element_of_its_axis(op: str) -> None:
    theirs = getattr(aten, op).default
    ours: Any = checked_ops.SUBSTITUTES[str(theirs)]
    v = torch.rand(4, 3, 2)
    for g, dim in ((torch.rand(4, 1, 1), 0), (torch.rand(1, 1, 2), 2)):
        assert all(torch.equal(a, b) for a, b in zip(ours(v, g, dim), theirs(v, g, dim), strict=True))
    for g, dim in ((ones(3, 1, 1), 0), (ones(4), 0), (ones(4, 3, 2), 0), (ones(2), 2), (ones(), 0), (ones(1, 1, 2), 3)):
        with pytest.raises(GraphqError, match="weight norm"):
            ours(v, g, dim)
    for wrong in ((v, ones(4, 1, 1).double(), 0), (ones(), ones(), 0), (v, ones(4, 1, 1), -3), (v, ones(1), -1)):
        with pytest.raises(GraphqError, match="weight norm"):
            ours(*wrong)
    inner = v, ones(1, 3, 1), 1  # which torch computes in another way
    if op == "_weight_norm":
        assert torch.equal(ours(*inner), theirs(*inner))
        assert torch.equal(ours(v, ones(), -1), theirs(v, ones(), -1))
    else:
        with pytest.raises(GraphqError, match="not the first or the last"):
            ours(*inner)
        strided = torch.rand(4, 3)[:, :1, None]  # where torch's own takes other elements
        assert torch.equal(ours(v, strided)[0], theirs(v, strided.contiguous())[0])


def bags(**changes: Any) -> list[Any]:
    """The arguments of a sum of weighed rows, two bags of them, with these in place of some."""
    given = {
        "weight": torch.rand(8, 3, generator=torch.Generator().manual_seed(0)),
        "indices": torch.tensor([0, 7, 2, 2]),
        "offsets": torch.tensor([0, 3]),
        "scale_grad_by_freq": False,
        "mode": 0,
        "sparse": False,
        "per_sample_weights": None,
        "include_last_offset": False,
        "padding_idx": None,
    }
    assert changes.keys() <= given.keys()
    return list({**given, **changes}.values())


@pytest.mark.parametrize(
    "changes",
    [
        *({"mode": mode} for mode in range(3)),
        {"per_sample_weights": torch.arange(4.0)},
        {"offsets": torch.tensor([0, 3, 4]), "include_last_offset": True},
        {"offsets": torch.tensor([0, 0, 4])},
        {"indices": torch.empty(0, dtype=torch.int64), "offsets": torch.tensor([0, 0])},
        {"padding_idx": 2},
        {"padding_idx": -1, "mode": 1},
    ],
    ids=str,
)
def test_bags_that_fit(changes: dict[str, Any]) -> None:
    ours, *rest = checked_ops.embedding_bag(*bags(**changes))
    theirs, *others = aten.embedding_bag.padding_idx(*bags(**changes))
    assert torch.equal(ours, theirs)
    assert [(x.shape, x.dtype, int(x.count_nonzero())) for x in rest] == [(x.shape, x.dtype, 0) for x in others]


@pytest.mark.parametrize(
    "changes",
    [
        {"weight": ones(8)},
        {"weight": ones(7, 3)},
        {"indices": torch.tensor([0, -1, 2, 2])},
        {"indices": torch.tensor([[0, 7], [2, 2]])},
        {"indices": torch.tensor([0, 7, 2, 2], dtype=torch.int32)},
        {"indices": torch.tensor([0.0, 7.0, 2.0, 2.0]), "offsets": torch.tensor([0.0, 3.0])},
        *({"offsets": torch.tensor(o)} for o in ([[0, 3]], [0, 5], [1, 3], [0, 3, 2], [-1, 3], [0, -2])),
        {"offsets": torch.empty(0, dtype=torch.int64)},
        {"offsets": torch.tensor([0, 3]), "include_last_offset": True},
        {"mode": 3},
        {"mode": -1},
        {"per_sample_weights": ones(3)},
        {"per_sample_weights": ones(4).double()},
        {"padding_idx": 8},
        {"padding_idx": -9},
    ],
    ids=str,
)
def test_bags_that_do_not_fit(changes: dict[str, Any]) -> None:
    with pytest.raises(GraphqError, match="embedding_bag"):
        checked_ops.embedding_bag(*bags(**changes))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kind", "gates"), [("lstm", 4), ("gru", 3), ("rnn_tanh", 1), ("rnn_relu", 1)])
def test_recurrent_cells_take_weights_that_fit(kind: str, gates: int, bias: bool) -> None:
    theirs = getattr(aten, f"{kind}_cell").default
    ours: Any = checked_ops.SUBSTITUTES[str(theirs)]
    state = torch.rand(3, 6)
    hx: Any = [state, state + 1] if kind == "lstm" else state
    weights = [torch.rand(gates * 6, 8), torch.rand(gates * 6, 6), *([torch.rand(gates * 6)] * 2 if bias else [])]
    args = [torch.rand(3, 8), hx, *weights]
    assert all(torch.equal(a, b) for a, b in zip(ours(*args), theirs(*args), strict=True))
    for place, fitting in enumerate(args):
        for tensor in fitting if isinstance(fitting, list) else [fitting]:
            for wrong in (tensor[:-1], tensor[..., :-1], tensor.unsqueeze(0), tensor[0], tensor.double()):
                swapped = [wrong if x is tensor else x for x in hx] if isinstance(fitting, list) else wrong
                with pytest.raises(GraphqError, match="recurrent cell"):
                    ours(*args[:place], swapped, *args[place + 1 :])
    if kind == "lstm":
        with pytest.raises(GraphqError, match="not two states"):
            ours(args[0], hx[:1], *weights)


INTEGERS = torch.tensor([7, -7, 5, 0, -(2**31), 2**31 - 1], dtype=torch.int32)


@pytest.mark.parametrize("mode", [None, "floor", "trunc"])
@pytest.mark.parametrize(
    ("x", "y"),
    [
        (INTEGERS, 2),
        (INTEGERS, -3),
        (INTEGERS, 2.5),
        (INTEGERS, torch.tensor([2, -2, -1, 3, 5, -1], dtype=torch.int32)),
        (INTEGERS[:4], -1),
        (INTEGERS.long(), -1),
        (INTEGERS, torch.tensor(-1)),  # of no axes, which leave the dtype alone: the least by -1 is beyond it
        (INTEGERS[4:], torch.tensor([-1])),
        (INTEGERS[:4].to(torch.int8), -1),
        (INTEGERS.float(), -1),
        (100, torch.tensor([7, -7])),
    ],
    ids=str,
)
def test_quotients_are_torchs(x: Any, y: Any, mode: str | None) -> None:
    op = aten.div.Tensor_mode if isinstance(y, Tensor) else aten.div.Scalar_mode
    crashes = mode == "trunc" and x is INTEGERS and isinstance(y, Tensor) and not y.dim()
    theirs = op(x[:4], y, rounding_mode=mode) if crashes else op(x, y, rounding_mode=mode)
    ours = checked_ops.SUBSTITUTES[str(op)](x, y, rounding_mode=mode)
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours[: len(theirs)], theirs)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_least_integer_by_minus_one_is_itself(dtype: torch.dtype) -> None:
    least = torch.iinfo(dtype).min
    x = torch.tensor([least, 5, least], dtype=dtype)
    for y in (-1, torch.tensor(-1, dtype=dtype), torch.tensor([-1, -1, 1], dtype=dtype)):
        assert checked_ops.div(x, y, rounding_mode="trunc").tolist() == [least, -5, least]
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        checked_ops.div(x, 0, rounding_mode="trunc")


def test_arithmetic_on_sizes() -> None:
    assert (checked_ops.mul(3, -4), checked_ops.pow(3, 4), checked_ops.pow(2, 62)) == (-12, 81, 2**62)
    assert (checked_ops.mul(2, 1.5), checked_ops.pow(2, -1), checked_ops.pow(2.0, 80)) == (3.0, 0.5, 2.0**80)
    assert torch.equal(checked_ops.mul(X, 2), X * 2)
    assert torch.equal(checked_ops.pow(X, 2), X**2)
    for op, x, y in (
        (checked_ops.mul, 2**62, 2),
        (checked_ops.mul, -(2**62), 2),
        (checked_ops.mul, [1], 2),
        (checked_ops.mul, 2, "a"),
        (checked_ops.pow, 2, 63),
        (checked_ops.pow, 3, 10**12),
        (checked_ops.pow, 9, 20),
    ):
        with pytest.raises(GraphqError, match=r"out of range|not of two numbers"):
            op(x, y)
