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
from graphq.runtime import checked_ops
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
    assert list(OVERLOADS) == sorted(OVERLOADS)
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
