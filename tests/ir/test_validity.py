"""Validity through a graph: what is said to be valid does not depend on what is not, and where it cannot be said."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx

from graphq.data.masks import MaskedBatch, Validity
from graphq.ir.effects import MixesAxis, Scatters
from graphq.ir.row_masks import row_mask
from graphq.ir.validity import ValidityRun
from graphq.ir.validity_rules import Rule
from graphq.ir.views import view
from graphq.runtime import ops
from tests.ir.op_calls import CASES
from tests.ir.test_effects import effect_of

aten = torch.ops.aten
G = torch.Generator().manual_seed(0)
F, T = False, True
X = torch.zeros(2, 3, 4)


def masked(target: Any, arguments: Sequence[Any], *masks: Tensor | Validity | None) -> Validity | list[Validity]:
    """The validity of what an op gives for these masks of its tensors, in their order."""
    graph, values, given = fx.Graph(), dict[fx.Node, Any](), list(masks)
    known: dict[fx.Node, Any] = {}

    def held(value: Any) -> Any:
        if isinstance(value, list) and any(isinstance(item, Tensor) for item in value):
            return [held(item) for item in value]
        if not isinstance(value, Tensor):
            return value
        node = graph.placeholder(f"x{len(values)}")
        node.meta["val"], values[node] = value, value
        mask = given.pop(0) if given else None
        if mask is not None:
            known[node] = mask if isinstance(mask, Validity) else Validity(mask)
        return node

    kwargs = arguments[-1] if isinstance(arguments[-1], dict) else {}
    positional = [a for a in arguments if not isinstance(a, dict)]
    node = graph.call_function(target, tuple(held(a) for a in positional), kwargs)
    made = target(*positional, **kwargs)
    node.meta["val"] = made
    return Rule(view(node), known, values, made).validity()


def mask_of(target: Any, arguments: Sequence[Any], *masks: Tensor | None) -> list[Any] | None:
    """The mask of an op's one output; None where all of it counts. It has not stopped."""
    found = masked(target, arguments, *masks)
    assert isinstance(found, Validity)
    assert found.stops == ()
    return None if found.mask is None else found.mask.tolist()


def stop_of(target: Any, arguments: Sequence[Any], *masks: Tensor | None) -> str:
    """The op that an op's output remembers, none of which is left out."""
    found = masked(target, arguments, *masks)
    found = found[0] if isinstance(found, list) else found
    assert found.mask is None
    (stop,) = found.stops
    return re.sub(r" \(\w+\)", "", stop)  # without its place


def bools(*rows: Any) -> Tensor:
    return torch.tensor(rows, dtype=torch.bool)


# -- what the table says of order and of sums


@pytest.mark.parametrize("target", [t for t, a in CASES.items() if isinstance(effect_of(t, a), MixesAxis)], ids=str)
def test_ops_that_order(target: Any) -> None:
    x = CASES[target][0]
    values, *rest = called(target, CASES[target])
    indices = rest[0] if rest else values
    orders = indices.dtype == torch.int64 and any(bool(indices.sort(a).values.diff(dim=a).all()) for a in range(3))
    assert effect_of(target, CASES[target]) == MixesAxis(orders=orders)  # each place once
    if rest:
        axis = next(a for a in range(3) if torch.equal(values, x.gather(a, indices.clamp(max=x.shape[a] - 1))))
        assert indices.shape[axis] <= x.shape[axis]


@pytest.mark.parametrize("target", [t for t, a in CASES.items() if isinstance(effect_of(t, a), Scatters)], ids=str)
def test_ops_that_add(target: Any) -> None:
    base, *rest = CASES[target]
    made, again = target(base, *rest), target(base + 1, *rest)
    found = effect_of(target, CASES[target])
    assert isinstance(found, Scatters)
    assert found.adds == torch.allclose(again, made + 1)  # what was there is still in every element


def test_an_index_put_adds_where_it_accumulates() -> None:
    given = (X, [torch.tensor([1, 0])], X)
    assert effect_of(aten.index_put.default, (*given, True)) == Scatters("slices", "values", adds=True)
    assert effect_of(aten.index_put.default, (*given, False)) == Scatters("slices", "values")


# -- every op: what it says is valid does not depend on what is not


def first_tensor(target: Any) -> int:
    """The argument whose elements an op is about."""
    later = (aten.addmm.default, aten.baddbmm.default, aten.addbmm.default, aten.embedding.default)
    return 1 if target in later else 0


RUN = [t for t, a in CASES.items() if isinstance(a[0], Tensor) and a[0].numel()]
SHAPES: dict[str, Callable[[Sequence[int]], list[int]]] = {
    "rows": lambda shape: [*shape[:-1], 1],
    "samples": lambda shape: [shape[0], *[1] * (len(shape) - 1)],
    "elements": lambda shape: [*shape],
}


def tried(target: Any, by: str) -> list[tuple[list[Any], list[Validity]]]:
    """What an op gives, and its validity, for a random mask of what it is about, and again with the rest changed."""
    arguments = list(CASES[target])
    at = first_tensor(target)
    x = arguments[at]
    mask = torch.rand(SHAPES[by](x.shape), generator=G) < 0.7
    mask.view(-1)[0], mask.view(-1)[-1] = False, True
    mask = mask.expand(x.shape)
    other = torch.roll(x, 1, 0) if x.dtype == torch.int64 else ~x if x.dtype == torch.bool else x * -1.7 + 0.3
    made: list[tuple[list[Any], list[Validity]]] = []
    for given in (x, torch.where(mask, x, other)):
        arguments[at] = given
        found = masked(target, arguments, *[None] * at, mask)
        made.append((called(target, arguments), found if isinstance(found, list) else [found]))
    return made


def called(target: Any, arguments: Sequence[Any]) -> list[Any]:
    kwargs = arguments[-1] if isinstance(arguments[-1], dict) else {}
    made = target(*[a for a in arguments if not isinstance(a, dict)], **kwargs)
    return list(made) if isinstance(made, list | tuple) else [made]


@pytest.mark.parametrize("by", SHAPES)
@pytest.mark.parametrize("target", RUN, ids=str)
def test_valid_elements_follow_from_valid_ones(target: Any, by: str) -> None:
    what = effect_of(target, CASES[target])
    for _ in range(3):
        (before, validity), (after, again) = tried(target, by)
        for a, b, one, other in zip(before, after, validity, again, strict=True):
            if one.mask is None:
                assert one.stops or validity[0].mask is not None or not isinstance(a, Tensor) or torch.equal(a, b)
                continue
            assert one.mask.shape == a.shape
            assert other.mask is not None
            x, y = a[one.mask], b[other.mask]
            if what == MixesAxis(orders=True):  # the same elements, in other places
                x, y = x.sort().values, y.sort().values
            else:
                assert torch.equal(one.mask, other.mask)
            assert torch.equal(x, y) or one.stops


def test_what_stops() -> None:
    """Of the ops of the table, those that cannot tell valid from invalid behind them, for each kind of mask."""
    found: dict[str, list[str]] = {}
    for by in SHAPES:
        for target in RUN:
            one = tried(target, by)[0][1][0]
            if one.mask is None and one.stops:
                found.setdefault(str(target).removeprefix("aten."), []).append(by)
    assert_expected_inline(
        "\n".join(f"{name}: {', '.join(kinds)}" for name, kinds in found.items()),
        """\
sum.dim_IntList: rows, samples, elements
sum.default: rows, samples, elements
mean.default: rows, samples, elements
amax.default: rows, elements
amin.default: rows, samples, elements
max.default: rows, samples, elements
min.default: rows, samples, elements
var.dim: rows, elements
std.dim: rows, elements
var.correction: rows, elements
std.correction: rows, samples, elements
var.default: rows, samples, elements
std.default: rows, samples, elements
var_mean.default: rows, samples, elements
std_mean.default: rows, samples, elements
var_mean.dim: rows, elements
std_mean.dim: rows, elements
var_mean.correction: rows, elements
std_mean.correction: rows, samples, elements
aminmax.default: rows, elements
prod.default: rows, elements
prod.dim_int: rows, elements
logsumexp.default: rows, elements
argmax.default: rows, elements
argmin.default: rows, samples, elements
max.dim: rows, elements
min.dim: rows, elements
any.dim: rows, elements
all.dim: rows, elements
any.default: rows, samples, elements
all.default: rows, samples, elements
softmax.int: rows, elements
log_softmax.int: rows, samples, elements
cumsum.default: rows, elements
cummax.default: rows, elements
glu.default: rows, elements
group_norm.default: rows, elements
instance_norm.default: rows, elements
max_pool2d.default: rows, elements
avg_pool2d.default: rows, elements
adaptive_avg_pool2d.default: rows, elements
max_pool3d.default: rows, elements
avg_pool3d.default: rows, elements
adaptive_avg_pool3d.default: rows, elements
conv1d.default: rows, elements
conv1d.padding: rows, elements
conv_transpose1d.default: rows, elements
conv2d.default: rows, elements
conv2d.padding: rows, elements
conv_transpose2d.input: rows, elements
conv3d.default: rows, elements
conv3d.padding: rows, elements
conv_transpose3d.input: rows, elements
addbmm.default: rows, samples, elements
mean.dim: elements
linalg_vector_norm.default: elements
_softmax.default: elements
_log_softmax.default: elements
cummin.default: elements
layer_norm.default: elements
native_layer_norm.default: elements
rms_norm.default: elements
max_pool1d.default: elements
avg_pool1d.default: elements
adaptive_avg_pool1d.default: elements
linear.default: elements
addmm.default: elements
graphq.grouped_linear.default: elements
matmul.default: elements
bmm.default: elements
mm.default: elements
baddbmm.default: elements
scaled_dot_product_attention.default: elements""",
    )


# -- each rule, and what differs from it only a little

TOKENS = bools([T, T, F], [F, T, T]).unsqueeze(-1).expand(2, 3, 4)  # rows
PARTS = bools([T, T, T, F]).expand(2, 3, 4)  # channels
WHOLE = bools([T], [F]).unsqueeze(-1).expand(2, 3, 4)  # samples
W = torch.zeros(5, 4)
ROWS = [[T, T, F], [F, T, T]]


def rows(found: list[Any] | None) -> list[Any]:
    """The mask of rows that are valid or invalid as a whole."""
    assert found is not None
    row = row_mask(torch.tensor(found), (-1,))
    assert row is not None
    return row[..., 0].tolist()


def test_movement_moves_the_mask() -> None:
    assert rows(mask_of(aten.view.default, (X, [6, 4]), TOKENS)) == [T, T, F, F, T, T]
    assert mask_of(aten.transpose.int, (X, 1, 2), TOKENS) == TOKENS.transpose(1, 2).tolist()
    assert rows(mask_of(aten.select.int, (X, 1, 0), TOKENS)) == [T, F]
    assert mask_of(aten.view.default, (X, [6, 4]), None) is None


def test_elementwise_ops_are_valid_where_all_operands_are() -> None:
    other = bools([T], [T]).unsqueeze(-1).expand(2, 1, 4)
    assert rows(mask_of(aten.add.Tensor, (X, X[:, :1]), TOKENS, other)) == ROWS
    assert rows(mask_of(aten.mul.Tensor, (X, X), TOKENS, WHOLE)) == [[T, T, F], [F, F, F]]
    assert rows(mask_of(aten.mul.Tensor, (X, X), None, TOKENS)) == ROWS
    assert mask_of(aten.mul.Tensor, (X, X)) is None
    count = fx.Graph().call_function(aten.sym_size.int, (X, 1))
    x = count.graph.placeholder("x")
    scaled = count.graph.call_function(aten.mul.Tensor, (x, count))
    found = Rule(view(scaled), {x: Validity(TOKENS)}, {x: X, count: 3}, X).validity()
    assert isinstance(found, Validity)
    assert rows(found.full(X).tolist()) == ROWS


def test_a_number_in_the_place_of_an_operand() -> None:
    chosen = X > 0
    assert rows(mask_of(aten.where.ScalarOther, (chosen, X, 0.0), None, TOKENS)) == ROWS
    assert rows(mask_of(aten.where.ScalarSelf, (chosen, 0.0, X), TOKENS, WHOLE)) == [[T, T, F], [F, F, F]]
    assert rows(mask_of(aten.where.Scalar, (chosen, 0.0, 1.0), TOKENS)) == ROWS
    assert rows(mask_of(aten.masked_fill.Tensor, (X, chosen, X[0, 0, 0]), TOKENS)) == ROWS


def test_elementwise_ops_with_several_outputs() -> None:
    found = masked(aten.frexp.Tensor, (X,), TOKENS)
    assert isinstance(found, list)
    assert [rows(one.full(X).tolist()) for one in found] == [ROWS, ROWS]


def test_one_hot_has_the_rows_of_its_indices() -> None:
    assert rows(mask_of(aten.one_hot.default, (torch.zeros(2, 3, dtype=torch.int64), 5), TOKENS[..., 0])) == ROWS


def test_reductions_of_channels_keep_rows() -> None:
    assert rows(mask_of(aten.mean.dim, (X, [-1], True), TOKENS)) == ROWS
    assert mask_of(aten.sum.dim_IntList, (X, [2]), TOKENS) == ROWS
    assert mask_of(aten.mean.dim, (X, [1]), WHOLE) == [[T] * 4, [F] * 4]
    assert stop_of(aten.mean.dim, (X, [1]), TOKENS) == "aten.mean.dim mixes tokens"
    assert stop_of(aten.mean.dim, (X, [-1]), PARTS) == "aten.mean.dim mixes tokens"


def test_an_axis_that_is_mixed_keeps_rows() -> None:
    assert rows(mask_of(aten.softmax.int, (X, -1), TOKENS)) == ROWS
    assert stop_of(aten.softmax.int, (X, 1), TOKENS) == "aten.softmax.int mixes tokens"
    assert stop_of(aten.cumsum.default, (X, 1), TOKENS) == "aten.cumsum.default mixes tokens"
    assert rows(mask_of(aten.glu.default, (X, -1), TOKENS)) == ROWS  # of two channels


def test_orders_take_the_mask_along() -> None:
    x = torch.tensor([[3.0, 1.0, 2.0]])
    ordered = masked(aten.sort.default, (x,), bools([F, T, T]))
    assert isinstance(ordered, list)
    assert [one.full(x).tolist() for one in ordered] == [[[T, T, F]]] * 2
    assert ordered[0].stops == ()
    assert mask_of(aten.argsort.default, (x,), bools([T, F, T])) == [[F, T, T]]
    best = masked(aten.topk.default, (x, 2), bools([F, T, T]))
    assert isinstance(best, list)
    assert [one.full(x).tolist() for one in best] == [[[F, T]]] * 2
    assert best[0].stops == ("aten.topk.default (topk_default) takes some tokens out of all",)
    of_channels = masked(aten.topk.default, (X, 2), TOKENS)
    assert isinstance(of_channels, list)
    assert of_channels[0].stops == ()


def test_norms() -> None:
    assert rows(mask_of(aten.layer_norm.default, (X, [4]), TOKENS)) == ROWS
    assert stop_of(aten.layer_norm.default, (X, [3, 4]), TOKENS) == "aten.layer_norm.default mixes tokens"
    assert mask_of(aten.group_norm.default, (X, 1), WHOLE) == WHOLE.tolist()
    assert stop_of(aten.group_norm.default, (X, 1), TOKENS) == "aten.group_norm.default mixes tokens"
    norm = (X, torch.ones(3), torch.zeros(3), torch.zeros(3), torch.ones(3), False, 0.1, 1e-5, False)
    assert mask_of(aten.batch_norm.default, norm, TOKENS) == TOKENS.tolist()
    of_batch = (*norm[:5], True, *norm[6:])
    stop = "aten.batch_norm.default mixes tokens"
    assert stop_of(aten.batch_norm.default, of_batch, WHOLE) == stop  # a group norm keeps samples
    assert (
        stop_of(aten.batch_norm.default, (X[0], *[a[:1].expand(4) for a in norm[1:5]], *of_batch[5:]), TOKENS[0])
        == stop
    )
    channels = bools([[T], [F], [T]]).expand(2, 3, 4)
    assert mask_of(aten.batch_norm.default, of_batch, channels) == channels.tolist()


def test_linears_keep_rows() -> None:
    assert rows(mask_of(aten.linear.default, (X, W), TOKENS)) == ROWS
    assert stop_of(aten.linear.default, (X, W), PARTS) == "aten.linear.default mixes tokens"
    assert rows(mask_of(aten.addmm.default, (torch.zeros(5), X[0], W.T), None, TOKENS[0])) == ROWS[0]
    residual = TOKENS[1, :, :1].expand(3, 5)
    assert rows(mask_of(aten.addmm.default, (torch.zeros(3, 5), X[0], W.T), residual, TOKENS[0])) == [F, T, F]
    assert rows(mask_of(aten.addmm.default, (torch.zeros(3, 5), X[0], W.T), residual)) == ROWS[1]
    experts = (X[0], torch.zeros(2, 5, 4), torch.tensor([1, 3], dtype=torch.int32))
    assert rows(mask_of(ops.grouped_linear, experts, TOKENS[0])) == ROWS[0]


def test_convolutions_of_one_place_keep_rows() -> None:
    x, mask = X.transpose(1, 2), TOKENS.transpose(1, 2)  # [batch, channels, tokens]
    one, three = torch.zeros(5, 4, 1), torch.zeros(5, 4, 3)
    assert mask_of(aten.conv1d.default, (x, one), mask) == mask[:, :1].expand(2, 5, 3).tolist()
    stop = "aten.conv1d.default mixes tokens"
    assert stop_of(aten.conv1d.default, (x, three), mask) == stop
    assert stop_of(aten.conv1d.default, (x, one, None, [2]), mask) == stop
    assert stop_of(aten.conv1d.default, (x, one, None, [1], [1]), mask) == stop
    whole = WHOLE.transpose(1, 2)
    assert mask_of(aten.conv1d.default, (x, three), whole) == [[[T]] * 5, [[F]] * 5]
    assert stop_of(aten.max_pool1d.default, (x, [2]), mask) == "aten.max_pool1d.default mixes tokens"


def test_products_have_the_rows_of_their_first_factor() -> None:
    y = torch.zeros(2, 4, 5)
    assert rows(mask_of(aten.bmm.default, (X, y), TOKENS)) == ROWS
    columns = bools([T, T, F, T, T]).expand(2, 4, 5)
    assert rows(mask_of(aten.bmm.default, (X, y), TOKENS, columns)) == ROWS  # a query's scores of all keys
    assert mask_of(aten.bmm.default, (X, y), None, columns) == columns[:, :3].tolist()
    stop = "aten.bmm.default mixes tokens"
    assert stop_of(aten.bmm.default, (X, y), PARTS) == stop
    assert stop_of(aten.bmm.default, (X, y), None, bools([T], [F], [T], [T]).expand(2, 4, 5)) == stop
    vector = torch.zeros(4)
    assert mask_of(aten.matmul.default, (X, vector), TOKENS) == ROWS
    assert mask_of(aten.matmul.default, (vector, X.transpose(1, 2)), None, TOKENS.transpose(1, 2)) == ROWS
    assert mask_of(aten.matmul.default, (X, vector), None, bools(T, T, T, T)) == [[T] * 3] * 2


def test_products_that_are_added() -> None:
    y, bias = torch.zeros(2, 4, 5), torch.zeros(2, 3, 5)
    target, added = aten.baddbmm.default, TOKENS[..., :1].flip(1).expand(2, 3, 5)
    assert rows(mask_of(target, (bias, X, y), None, TOKENS)) == ROWS
    assert rows(mask_of(target, (bias, X, y), added)) == [[F, T, T], [T, T, F]]
    assert rows(mask_of(target, (bias, X, y), added, TOKENS)) == [[F, T, F], [F, T, F]]
    columns = bools([T, T, F, T, T]).expand(2, 4, 5)
    assert mask_of(target, (bias, X, y), None, None, columns) == columns[:, :3].tolist()
    assert mask_of(target, (bias, X, y)) is None
    assert stop_of(target, (bias, X, y), None, PARTS) == "aten.baddbmm.default mixes tokens"

    target, stop = aten.addbmm.default, "aten.addbmm.default mixes tokens"
    same = TOKENS[:1].expand(2, 3, 4)
    assert rows(mask_of(target, (bias[0], X, y), None, same)) == ROWS[0]
    assert rows(mask_of(target, (bias[0], X, y), added[0], same)) == [F, T, F]
    assert mask_of(target, (bias[0], X, y), None, None, columns) == columns[0, :3].tolist()
    assert stop_of(target, (bias[0], X, y), None, TOKENS) == stop  # the batch is added up
    assert stop_of(target, (bias[0], X, y), None, None, columns & bools([[T]], [[F]])) == stop


def test_attention_has_the_rows_of_the_query() -> None:
    q, k = torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 6, 4)
    target, mask = aten.scaled_dot_product_attention.default, TOKENS.unsqueeze(1)
    keys = bools([T, F, T, T, T, T]).view(1, 1, 6, 1).expand(2, 1, 6, 4)
    assert rows(mask_of(target, (q, k, k), mask, keys, keys)) == [[r] for r in ROWS]
    assert mask_of(target, (q, k, k), None, keys, keys) is None
    stopped = Validity(None, ("a stop",))
    for query, stops in ((None, ("a stop",)), (mask, ())):
        found = masked(target, (q, k, k), query, stopped, stopped)
        assert isinstance(found, Validity)
        assert (found.mask is None, found.stops) == (query is None, stops)
    stop = "aten.scaled_dot_product_attention.default mixes tokens"
    assert stop_of(target, (q, k, k), PARTS.unsqueeze(1)) == stop


def test_joined_with_what_all_counts() -> None:
    assert rows(mask_of(aten.cat.default, ([X, X[:, :1]], 1), TOKENS)) == [[T, T, F, T], [F, T, T, T]]
    assert mask_of(aten.stack.default, ([X[0], X[1]], 0), None, TOKENS[1]) == [[[T] * 4] * 3, TOKENS[1].tolist()]


def test_rows_picked_by_indices() -> None:
    order = torch.tensor([2, 0, 1, 2])
    assert rows(mask_of(aten.index.Tensor, (X[0], [order]), TOKENS[0])) == [F, T, T, F]
    assert rows(mask_of(aten.index_select.default, (X, 1, order), TOKENS)) == [[F, T, T, F], [T, F, T, T]]
    known = bools(T, T, F, T)
    assert rows(mask_of(aten.index.Tensor, (X[0], [order]), TOKENS[0], known)) == [F, T, F, F]
    assert rows(mask_of(aten.index.Tensor, (X[0], [order]), None, known)) == known.tolist()
    assert rows(mask_of(aten.index_select.default, (X, 1, order), None, known)) == [known.tolist()] * 2
    middle = mask_of(aten.index.Tensor, (X, [None, order]), TOKENS, known)
    assert rows(middle) == [[F, T, F, F], [T, F, F, T]]
    split = torch.zeros(2, 3, 4, 3)
    apart = mask_of(aten.index.Tensor, (split, [torch.tensor([0, 1]), None, torch.tensor([1, 1])]), None, bools(F, T))
    assert apart == [[[F] * 3] * 3, [[T] * 3] * 3]  # indices that stand apart come first
    assert rows(mask_of(aten.index.Tensor, (X[0], [bools(T, F, T)]), TOKENS[0], bools(F, F, F))) == [T, F]


def test_codes_have_the_mask_of_what_they_are_codes_of() -> None:
    scale = torch.ones(2, 3, 1)
    quantize = (X, scale, None, None, "int8", [1, 1, -1])
    assert rows(mask_of(ops.quantize, quantize, TOKENS)) == ROWS
    assert rows(mask_of(ops.dequantize, (X.to(torch.int8), *quantize[1:]), TOKENS, WHOLE[..., :1])) == ROWS
    choice = ([X[0], X[1]], torch.tensor([1, 3], dtype=torch.int32), [1, 0])
    assert rows(mask_of(ops.select_rows, choice, TOKENS[0], TOKENS[0])) == ROWS[0]


def test_elements_gathered() -> None:
    index = torch.tensor([[2, 2, 0], [1, 0, 2]])
    assert mask_of(aten.gather.default, (X[:, :, 0], 1, index), TOKENS[:, :, 0]) == [[F, F, T], [T, F, T]]
    known = bools([T, T, F], [T, T, T])
    assert mask_of(aten.gather.default, (X[:, :, 0], 1, index), None, known) == known.tolist()
    assert mask_of(aten.gather.default, (X[:, :, 0], 1, index), TOKENS[:, :, 0], known) == [[F, F, F], [T, F, T]]


def test_a_permutation_is_undone() -> None:
    order, places = torch.tensor([2, 0, 1]), torch.arange(3)
    assert mask_of(aten.index_put.default, (places, [order], places), None, bools(F, T, T)) == [T, T, F]
    x, put = X[0], X[1]
    assert rows(mask_of(aten.index_put.default, (x, [order], put), None, None, TOKENS[0])) == [T, F, T]
    assert rows(mask_of(aten.index_put.default, (x, [order[:2]], put[:2]), TOKENS[0], None, None)) == [T, T, T]


def test_sums_are_valid_where_all_their_parts_are() -> None:
    to = torch.tensor([0, 0, 2])
    assert rows(mask_of(aten.index_add.default, (X[0], 0, to, X[1]), None, None, TOKENS[1])) == [F, T, T]
    assert rows(mask_of(aten.index_add.default, (X[0], 0, to, X[1]), TOKENS[0], None, TOKENS[1])) == [F, T, F]
    assert rows(mask_of(aten.index_copy.default, (X[0], 0, to[1:], X[1, 1:]), None, None, TOKENS[1, 1:])) == [T, T, T]
    assert rows(mask_of(aten.index_put.default, (X[0], [to], X[1], True), None, None, TOKENS[1])) == [F, T, T]
    assert rows(mask_of(aten.index_put.default, (X[0], [to], X[1], True), None, bools(T, F, T))) == [F, T, T]
    line, index = X[0, :, 0], torch.tensor([0, 0, 2])
    assert mask_of(aten.scatter_add.default, (line, 0, index, line), None, None, bools(T, F, T)) == [F, T, T]


def test_indices_of_invalid_rows_leave_them_invalid() -> None:
    chosen = torch.tensor([[0], [3]])
    known = bools([F], [T])
    assert mask_of(aten.scatter.value, (X[0, :2], 1, chosen, 1.0), None, known) == [[F] * 4, [T] * 4]
    source = X[0, :2, :1]
    assert mask_of(aten.scatter.src, (X[0, :2], 1, chosen, source), None, None, known) == [[F, T, T, T], [T] * 4]
    between = torch.tensor(
        [[0, 1, 1, 0]]
    )  # along the axis of rows, where those of single elements say nothing of others
    assert mask_of(aten.scatter.value, (X[0, :2], 0, between, 1.0), None, bools([F, T, T, T])) == [
        [F, T, T, T],
        [F, T, T, T],
    ]


def test_slices_written() -> None:
    assert rows(mask_of(aten.slice_scatter.default, (X, X[:, :2], 1, 0, 2), None, TOKENS[:, :2])) == [
        [T, T, T],
        [F, T, T],
    ]
    assert rows(mask_of(aten.select_scatter.default, (X, X[:, 0], 1, 2), TOKENS, WHOLE[:, 0])) == [[T, T, T], [F, T, F]]


def test_padding() -> None:
    assert rows(mask_of(aten.constant_pad_nd.default, (X, [0, 0, 1, 0]), TOKENS)) == [[T, T, T, F], [T, F, T, T]]
    assert mask_of(aten.pad.default, (X, [1, 2]), TOKENS) == TOKENS[..., :1].expand(2, 3, 7).tolist()
    assert stop_of(aten.pad.default, (X, [0, 0, 1, 0], "replicate"), TOKENS) == "aten.pad.default mixes tokens"
    assert mask_of(aten.pad.default, (X, [1, 0], "replicate"), TOKENS) == TOKENS[..., :1].expand(2, 3, 5).tolist()


def test_ops_that_are_not_known() -> None:
    stop = "aten.histc.default is not known to keep tokens apart"
    assert stop_of(aten.histc.default, (X,), TOKENS) == stop


# -- through a graph


def graph_of(f: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    from torch.fx.experimental.proxy_tensor import make_fx

    gm = make_fx(lambda *args: (f(*args),))(*inputs)  # pyright: ignore[reportUnknownLambdaType]
    for node in gm.graph.nodes:
        node.meta.setdefault("val", node.meta.get("tensor_meta"))
    return gm


def through(f: Callable[..., Any], mask: Tensor, x: Tensor = X) -> Validity:
    made = ValidityRun(graph_of(f, x)).run_batch(MaskedBatch((x,), (Validity(mask),)))
    assert torch.equal(made[0], f(x))
    return made.validity[0]


def test_stops_are_remembered() -> None:
    found = through(lambda x: x.mean(1).sum(0), TOKENS)
    assert (found.mask, found.stops) == (None, ("aten.mean.dim (mean) mixes tokens",))
    found = through(lambda x: torch.cat([x.flip(1) - x.mean(1, keepdim=True), x.cumsum(1)], 1), TOKENS)
    assert found.mask is not None  # of the first half
    assert found.stops == ("aten.cumsum.default (cumsum) mixes tokens",)
    found = through(lambda x: x.cumsum(1) + x[:, :1], TOKENS)
    assert found.mask is not None  # of samples
    assert found.stops == ("aten.cumsum.default (cumsum) mixes tokens",)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x * x.mean(1, keepdim=True) + 1,
        lambda x: x.cumsum(1) + x,
        lambda x: x @ x.cumsum(1).mT,
        lambda x: torch.baddbmm(x.cumsum(1), x, x.new_ones(2, 4, 4)),
        lambda x: torch.addmm(x.cumsum(1).view(6, 4), x.view(6, 4), x.new_ones(4, 4)).view(2, 3, 4),
    ],
)
def test_a_mask_of_all_rows_forgets_stops(f: Callable[[Tensor], Tensor]) -> None:
    found = through(f, TOKENS)
    assert found.mask is not None
    assert (rows(found.mask.tolist()), found.stops) == (ROWS, ())


SINK = torch.ones(1, 1, 1)


def test_parameters_that_are_joined_have_the_rows_of_what_they_are_joined_with() -> None:
    sinks = lambda x: (2 * SINK).expand(x.shape[0], 3, 1)  # noqa: E731
    found = through(lambda x: torch.cat([x, sinks(x)], -1).softmax(-1), TOKENS)
    assert found.mask is not None
    assert (rows(found.mask.tolist()), found.stops) == (ROWS, ())
    found = through(lambda x: torch.stack([x[..., 0], sinks(x)[..., 0]], 0), TOKENS)
    assert found.full(X).tolist() == [ROWS, ROWS]
    found = through(lambda x: torch.cat([SINK.expand(2, 1, 4), x], 1), TOKENS & WHOLE)
    assert rows(found.full(X).tolist()) == [[T, T, T, F], [F, F, F, F]]  # a first token, and a sample of padding
    found = through(lambda x: torch.cat([x[..., :0], SINK.expand(2, 3, 1)], -1), TOKENS)
    assert found.full(X[..., :1]).all()


def test_shapes_remember_nothing() -> None:
    found = through(lambda x: torch.ones_like(x.mean(1)), TOKENS)
    assert found.is_trivial
