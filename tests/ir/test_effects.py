"""Every op of the table does what the table says: each is run on random tensors in float64."""

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from graphq.ir.effect_table import EFFECTS, axes_of, channel_axis, effect
from graphq.ir.effects import (
    Adds,
    Attends,
    Contracts,
    Convolves,
    Copies,
    Effect,
    Elementwise,
    Gathers,
    Homogeneous,
    Joins,
    LooksUp,
    MixesAxis,
    Moves,
    Normalizes,
    Observes,
    Opaque,
    Pads,
    Pools,
    Projects,
    ReadsShape,
    Reduces,
    Scales,
    Scatters,
)
from graphq.ir.views import view
from graphq.runtime import ops

aten = torch.ops.aten
G = torch.Generator().manual_seed(0)


def r(*shape: int) -> Tensor:
    """Random numbers of both signs, all different."""
    return torch.randn(*shape, generator=G, dtype=torch.float64)


X = r(4, 6, 10)
BOOL = (X > 0, r(4, 6, 10) > 0)
ROWS = torch.tensor([2, 0, 3, 1])
IMAGES, CLIPS = r(2, 4, 6, 6), r(2, 4, 6, 6, 6)
CHANNELS = (r(4), r(4), r(4), r(4).abs())  # gain, bias, mean, variance

# The arguments of one call of every op in the table; a dict: those that are given by name.
CASES: dict[Any, tuple[Any, ...]] = {
    aten.alias.default: (X,),
    aten.detach.default: (X,),
    aten.clone.default: (X,),
    aten.contiguous.default: (X,),
    aten.lift_fresh_copy.default: (X,),
    aten._to_copy.default: (X,),
    aten.to.dtype: (X, torch.float64),
    aten.view.default: (X, [4, 2, 3, 10]),
    aten.reshape.default: (X, [4, -1]),
    aten._unsafe_view.default: (X, [24, 10]),
    aten.flatten.using_ints: (X, 1),
    aten.unflatten.int: (X, 2, [2, 5]),
    aten.unsqueeze.default: (X, 1),
    aten.squeeze.default: (X[:, :1],),
    aten.squeeze.dim: (X[:, :1], 1),
    aten.squeeze.dims: (X[:, :1], [1]),
    aten.transpose.int: (X, 1, 2),
    aten.permute.default: (X, [2, 0, 1]),
    aten.t.default: (X[0],),
    aten.mT.default: (X,),
    aten.numpy_T.default: (X,),
    aten.movedim.int: (X, 0, -1),
    aten.movedim.intlist: (X, [0, 1], [1, 0]),
    aten.swapaxes.default: (X, 0, 1),
    aten.select.int: (X, 1, 3),
    aten.slice.Tensor: (X, 2, 1, 9, 2),
    aten.narrow.default: (X, 2, 1, 4),
    aten.flip.default: (X, [0, 2]),
    aten.roll.default: (X, [2], [1]),
    aten.expand.default: (X[:, :1], [3, 4, 6, 10]),
    aten.repeat.default: (X, [2, 1, 3]),
    aten.repeat_interleave.self_int: (X, 2, 1),
    aten.split.Tensor: (X, 4, 2),
    aten.split_with_sizes.default: (X, [3, 7], 2),
    aten.chunk.default: (X, 3, 1),
    aten.unbind.int: (X, 1),
    aten.tensor_split.sections: (X, 4, 2),
    operator.getitem: ([X, r(2)], 0),
    aten.relu.default: (X,),
    aten.leaky_relu.default: (X, 0.2),
    aten.prelu.default: (X, r(6)),
    aten.abs.default: (X,),
    aten.neg.default: (X,),
    aten.__and__.Tensor: BOOL,
    aten.__or__.Tensor: BOOL,
    aten.__xor__.Tensor: BOOL,
    aten.__and__.Scalar: (BOOL[0], True),
    aten.__or__.Scalar: (BOOL[0], False),
    aten.floor_divide.default: (X, r(4, 6, 10)),
    aten.hardswish.default: (X,),
    aten.log_sigmoid.default: (X,),
    aten.tril.default: (X,),
    aten.triu.default: (X, 1),
    aten.copy.default: (X, r(4, 6, 10)),
    aten.add.Tensor: (X, r(4, 6, 10)),
    aten.sub.Tensor: (X, r(4, 6, 10)),
    aten.add.Scalar: (X, 2.0),
    aten.sub.Scalar: (X, 2.0),
    aten.mul.Tensor: (X, r(4, 6, 10)),
    aten.mul.Scalar: (X, 3.0),
    aten.div.Tensor: (X, r(4, 6, 10)),
    aten.div.Scalar: (X, 3.0),
    aten.sum.dim_IntList: (X, [0, -1]),
    aten.mean.dim: (X, [-1], True),
    aten.sum.default: (X,),
    aten.mean.default: (X,),
    aten.amax.default: (X, [1]),
    aten.amin.default: (X, []),
    aten.max.default: (X,),
    aten.min.default: (X,),
    aten.linalg_vector_norm.default: (X, 2, [2], True),
    aten.var.dim: (X, [1]),
    aten.std.dim: (X, [1, 2]),
    aten.var.correction: (X, [1]),
    aten.std.correction: (X, None),
    aten.prod.dim_int: (X, 1),
    aten.logsumexp.default: (X, [1, 2]),
    aten.argmax.default: (X, 1),
    aten.argmin.default: (X,),
    aten.max.dim: (X, 1),
    aten.min.dim: (X, 1),
    aten.any.dim: (X, 1),
    aten.all.dim: (X, 1),
    aten.any.default: (X,),
    aten.all.default: (X,),
    aten.softmax.int: (X, 1),
    aten._softmax.default: (X, -1, False),
    aten.log_softmax.int: (X, 0),
    aten._log_softmax.default: (X, -1, False),
    aten.cumsum.default: (X, 1),
    aten.sort.default: (X,),
    aten.sort.stable: (X, {"stable": True, "dim": 1}),
    aten.argsort.default: (X, 0),
    aten.argsort.stable: (X, {"stable": True, "dim": 1}),
    aten.topk.default: (X, 2, 1),
    aten.glu.default: (X, 1),
    aten.layer_norm.default: (X, [10], r(10), r(10)),
    aten.native_layer_norm.default: (X, [10], r(10), r(10), 1e-5),
    aten.rms_norm.default: (X, [10], r(10)),
    aten.batch_norm.default: (IMAGES, *CHANNELS, False, 0.1, 1e-5, False),
    aten._native_batch_norm_legit_no_training.default: (IMAGES, *CHANNELS, 0.1, 1e-5),
    aten.group_norm.default: (IMAGES, 2, r(4), r(4)),
    aten.instance_norm.default: (IMAGES, r(4), r(4), None, None, True, 0.1, 1e-5, False),
    aten.max_pool1d.default: (IMAGES[0], [2]),
    aten.avg_pool1d.default: (IMAGES[0], [2]),
    aten.adaptive_avg_pool1d.default: (IMAGES[0], [2]),
    aten.max_pool2d.default: (IMAGES, [3, 3], [1, 1], [1, 1]),
    aten.avg_pool2d.default: (IMAGES, [2, 2]),
    aten.adaptive_avg_pool2d.default: (IMAGES, [2, 3]),
    aten.max_pool3d.default: (CLIPS, [2, 2, 2]),
    aten.avg_pool3d.default: (CLIPS, [2, 2, 2]),
    aten.adaptive_avg_pool3d.default: (CLIPS, [2, 2, 2]),
    aten.linear.default: (X, r(3, 10), r(3)),
    aten.addmm.default: (r(3), r(6, 10), r(10, 3)),
    ops.grouped_linear: (r(4, 10), r(2, 3, 10), torch.tensor([1, 4], dtype=torch.int32)),
    aten.conv1d.default: (r(2, 4, 6), r(5, 4, 3)),
    aten.conv1d.padding: (r(2, 4, 6), r(5, 4, 3), None, [1], "same"),
    aten.conv_transpose1d.default: (r(2, 4, 6), r(4, 5, 3)),
    aten.conv2d.default: (IMAGES, r(5, 4, 3, 3)),
    aten.conv2d.padding: (IMAGES, r(5, 4, 3, 3), None, [1, 1], "same"),
    aten.conv_transpose2d.input: (IMAGES, r(4, 5, 3, 3)),
    aten.conv3d.default: (CLIPS, r(5, 4, 3, 3, 3)),
    aten.conv3d.padding: (CLIPS, r(5, 4, 3, 3, 3), None, [1, 1, 1], "same"),
    aten.conv_transpose3d.input: (CLIPS, r(4, 5, 3, 3, 3)),
    aten.embedding.default: (r(5, 6), torch.tensor([[3, 0, 3], [1, 1, 4]])),
    aten.matmul.default: (X, r(10, 7)),
    aten.bmm.default: (X, r(4, 10, 7)),
    aten.mm.default: (X[0], r(10, 7)),
    aten.scaled_dot_product_attention.default: (r(2, 3, 5, 4), r(2, 3, 6, 4), r(2, 3, 6, 4)),
    aten.cat.default: ([X, r(4, 2, 10)], 1),
    aten.stack.default: ([X, r(4, 6, 10)], 1),
    aten.index.Tensor: (X, [None, ROWS]),
    aten.index_select.default: (X, 0, ROWS),
    aten.gather.default: (X, 1, torch.tensor([[[5, 0, 2]], [[1, 1, 3]]])),
    aten.index_add.default: (X, 0, ROWS, r(4, 6, 10)),
    aten.index_copy.default: (X, 0, ROWS, r(4, 6, 10)),
    aten.index_put.default: (X, [ROWS], r(4, 6, 10)),
    aten.scatter.src: (X, 1, torch.tensor([[[5, 0, 2]]]), r(1, 1, 3)),
    aten.scatter_add.default: (X, 1, torch.tensor([[[5, 0, 2]]]), r(1, 1, 3)),
    aten.slice_scatter.default: (X, r(4, 2, 10), 1, 2, 4),
    aten.select_scatter.default: (X, r(4, 10), 1, 2),
    aten.scatter.value: (X, 1, torch.tensor([[[5, 0, 2]]]), 0.0),
    aten.constant_pad_nd.default: (X, [1, 2], 3.0),
    aten.pad.default: (X, [0, 1, 2, 0]),
    aten.sym_size.int: (X, 1),
    aten.sym_numel.default: (X,),
    aten.new_empty.default: (X, [0, 3]),
    aten.empty_like.default: (X[:0],),
    aten.full.default: ([2], 3.0),
    aten.full_like.default: (X, 3.0),
    aten.new_full.default: (X, [2], 3.0),
    aten.arange.default: (4,),
    aten.arange.start: (1, 4),
    aten.arange.start_step: (1, 4, 2),
    aten.empty.memory_format: ([0],),
    aten.scalar_tensor.default: (3.0,),
    aten.eye.default: (3,),
    aten.eye.m: (3, 4),
    aten.fill.Scalar: (X, 3.0),
    aten.zeros.default: ([3],),
    aten.zeros_like.default: (X,),
    aten.new_zeros.default: (X, [3]),
    aten.ones.default: ([3],),
    aten.ones_like.default: (X,),
    aten.new_ones.default: (X, [3]),
    aten.dropout.default: (X, 0.5, False),
    aten.feature_dropout.default: (X, 0.5, False),
    aten.alpha_dropout.default: (X, 0.5, False),
    aten.feature_alpha_dropout.default: (X, 0.5, False),
}


def node_of(target: Any, arguments: Sequence[Any]) -> fx.Node:
    """A node that calls ``target`` with these arguments, each tensor of which is a node that knows it as its val."""
    graph = fx.Graph()

    def held(value: Any) -> Any:
        if isinstance(value, list):
            return [held(item) for item in value]
        if not isinstance(value, Tensor):
            return value
        node = graph.placeholder(f"x{len(graph.nodes)}")
        node.meta["val"] = value
        return node

    node = graph.call_function(target, tuple(held(a) for a in arguments if not isinstance(a, dict)), named(arguments))
    node.meta["val"] = of(target, arguments)(arguments[0])
    return node


def named(arguments: Sequence[Any]) -> dict[str, Any]:
    return arguments[-1] if arguments and isinstance(arguments[-1], dict) else {}


def effect_of(target: Any, arguments: Sequence[Any]) -> Effect:
    return effect(view(node_of(target, arguments)))


def flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def others(x: Tensor) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """``x`` with one element changed, and its index: a few of them."""
    for place in torch.randperm(x.numel(), generator=G)[:8].tolist():
        changed = x.clone()
        changed.view(-1)[place] = ~x.view(-1)[place] if x.dtype == torch.bool else x.view(-1)[place] * -1.7 + 0.3
        yield tuple(int(i) for i in torch.unravel_index(torch.tensor(place), x.shape)), changed


def changes(f: Callable[[Tensor], Any], x: Tensor) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """For elements of ``x``: its index, and where what ``f`` gives changes with it; ``f`` gives one tensor or alike."""
    for index, changed in others(x.contiguous()):
        for before, after in zip(flat(f(x)), flat(f(changed)), strict=True):
            yield index, (before != after) & ~(before.isnan() & after.isnan())


def follows(f: Callable[[Tensor], Any], x: Tensor, axes: Sequence[int | None]) -> bool:
    """Whether an element reaches those alone that have its own indices along each of these axes of the output.

    ``axes``: for each axis of the output the axis of ``x`` that it is; None for one of which all indices are reached.
    """
    for index, where in changes(f, x):
        reachable = torch.zeros_like(where)
        reachable[tuple(slice(None) if axis is None else index[axis] for axis in axes)] = True
        if bool((where & ~reachable).any()):
            return False
    return True


def is_homogeneous(f: Callable[[Tensor], Any], x: Tensor) -> bool:
    return all(
        torch.allclose(a, 2.5 * b, rtol=1e-12, atol=1e-12) for a, b in zip(flat(f(2.5 * x)), flat(f(x)), strict=True)
    )


def is_linear(f: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    y = r(*x.shape)
    return torch.allclose(f(x - y), f(x) - f(y), rtol=1e-12, atol=1e-12)


def of(target: Any, arguments: Sequence[Any], at: int = 0) -> Callable[[Any], Any]:
    """The op as a function of one argument."""
    rest = [a for a in arguments[at + 1 :] if not isinstance(a, dict)]
    return lambda x: target(*arguments[:at], x, *rest, **named(arguments))


def same(x: Tensor) -> list[int]:
    return list(range(x.dim()))


def test_every_op_is_tried() -> None:
    assert set(CASES) == set(EFFECTS)


def targets(*kinds: type) -> list[Any]:
    found = [target for target, arguments in CASES.items() if isinstance(effect_of(target, arguments), kinds)]
    assert found
    return found


@pytest.mark.parametrize("target", targets(Copies), ids=str)
def test_copies(target: Any) -> None:
    assert torch.equal(target(*CASES[target]), CASES[target][0])


@pytest.mark.parametrize("target", targets(Moves), ids=str)
def test_moves(target: Any) -> None:
    found = effect_of(target, CASES[target])
    assert isinstance(found, Moves)
    x = CASES[target][0]
    if found.how == "item":
        assert target(*CASES[target]) is x[0]
        return
    labels = torch.arange(x.numel()).view(x.shape)
    moved = of(target, CASES[target])(labels)
    assert isinstance(moved, Tensor) == (found.how != "split")
    assert all(torch.equal(a, x.flatten()[b]) for a, b in zip(flat(target(*CASES[target])), flat(moved), strict=True))
    counts = torch.cat([part.flatten() for part in flat(moved)]).bincount(minlength=x.numel())
    assert {"pick": counts.max() == 1, "repeat": counts.min() > 1}.get(found.how, counts.eq(1).all())
    if found.how == "reshape":
        assert torch.equal(moved.flatten(), labels.flatten())
    if found.how == "permute":
        assert moved.shape != x.shape
        assert sorted(moved.shape) == sorted(x.shape)
        strides = sorted(of(target, CASES[target])(torch.zeros(x.shape)).stride())
        assert strides == sorted(x.contiguous().stride()), "the axes themselves"


@pytest.mark.parametrize("target", targets(Homogeneous), ids=str)
def test_homogeneous(target: Any) -> None:
    f, x = of(target, CASES[target]), CASES[target][0]
    assert is_homogeneous(f, x)
    assert follows(f, x, same(x))
    assert effect_of(target, CASES[target]) == Homogeneous(linear=is_linear(f, x))


@pytest.mark.parametrize("target", targets(Elementwise, Adds, Scales), ids=str)
def test_elementwise(target: Any) -> None:
    arguments = CASES[target]
    for at, x in enumerate(arguments):
        if isinstance(x, Tensor):
            assert follows(of(target, arguments, at), x, same(x))


@pytest.mark.parametrize("target", targets(Adds), ids=str)
def test_adds(target: Any) -> None:
    x, y = CASES[target]
    assert torch.allclose(target(2.5 * x, 2.5 * y), 2.5 * target(x, y), rtol=1e-12, atol=1e-12)
    assert not is_homogeneous(of(target, CASES[target]), x)


@pytest.mark.parametrize("target", targets(Scales), ids=str)
def test_scales(target: Any) -> None:
    (x, y), found = CASES[target], effect_of(target, CASES[target])
    assert isinstance(found, Scales)
    assert is_linear(of(target, CASES[target]), x)
    assert torch.allclose(target(x, 2.5 * y), target(x, y) * (1 / 2.5 if found.divides else 2.5), rtol=1e-12, atol=0)


@pytest.mark.parametrize("target", targets(Reduces), ids=str)
def test_reduces(target: Any) -> None:
    f, x = of(target, CASES[target]), CASES[target][0]
    axes = axes_of(view(node_of(target, CASES[target])))
    found = effect_of(target, CASES[target])
    assert isinstance(found, Reduces)
    made = flat(f(x))[0]
    kept = [axis for axis in range(3) if axis not in axes]
    keeps = made.dim() == 3
    assert list(made.shape) == [x.shape[axis] if axis in kept else 1 for axis in range(3) if keeps or axis in kept]
    if kept:
        assert follows(f, x, [axis if axis in kept else None for axis in range(3) if keeps or axis in kept])
    if made.is_floating_point() and isinstance(f(x), Tensor):
        assert (found.of == "linear") == is_linear(f, x)
        assert (found.of != "other") == is_homogeneous(f, x) or target in (aten.std.dim, aten.std.correction)


@pytest.mark.parametrize("target", targets(MixesAxis), ids=str)
def test_mixes_an_axis(target: Any) -> None:
    f, x = of(target, CASES[target]), CASES[target][0]
    (mixed,) = axes_of(view(node_of(target, CASES[target])))
    assert follows(f, x, [None if axis == mixed else axis for axis in range(x.dim())])
    assert flat(f(x))[0].shape != x.shape or not follows(f, x, same(x))


@pytest.mark.parametrize("target", targets(Normalizes), ids=str)
def test_normalizes(target: Any) -> None:
    arguments = CASES[target]
    found, x = effect_of(target, arguments), arguments[0]
    assert isinstance(found, Normalizes)
    f = lambda *a: flat(target(*a))[0]  # noqa: E731  # with its statistics, perhaps
    names = [argument.name for argument in target._schema.arguments]
    assert tuple(name for name in ("weight", "bias") if name in names) == found.parameters
    assert follows(lambda y: f(y, *arguments[1:]), x, same(x)) == (found.over == "nothing")
    assert follows(lambda y: f(y, *arguments[1:]), x, [*same(x)[:-1], None]) == (found.over != "positions")
    axis = found.axis % x.dim()
    for name in found.parameters:  # each runs along the axis
        at = names.index(name)
        channel = torch.zeros(x.shape[axis], dtype=torch.bool)
        channel[2] = True
        changed = f(*arguments[:at], torch.where(channel, arguments[at] + 1, arguments[at]), *arguments[at + 1 :])
        where = (changed != f(*arguments)).movedim(axis, 0)
        assert where[2].any()
        assert not where[~channel].any()
    doubled = list(arguments)
    for name in found.parameters:
        doubled[names.index(name)] = 2 * arguments[names.index(name)]
    assert torch.allclose(f(*doubled), 2 * f(*arguments), rtol=1e-12, atol=1e-12)
    shifted = f(x + 3, *arguments[1:])
    assert torch.allclose(shifted, f(*arguments), rtol=1e-5) == (found.centres and found.over != "nothing")


def test_a_batch_norm_in_training_mixes_positions() -> None:
    arguments = (IMAGES, *CHANNELS, True, 0.1, 1e-5, False)
    assert effect_of(aten.batch_norm.default, arguments) == Normalizes(1, "positions")


@pytest.mark.parametrize("target", targets(Pools), ids=str)
def test_pools(target: Any) -> None:
    f, batch = of(target, CASES[target]), CASES[target][0]
    found = effect_of(target, CASES[target])
    assert isinstance(found, Pools)
    for x in (batch, batch[0]):
        if x.dim() > found.rank:
            assert is_homogeneous(f, x)
            assert follows(f, x, [*range(x.dim() - found.rank), *[None] * found.rank])
            axis = channel_axis(view(node_of(target, (x, *CASES[target][1:])))) % x.dim()
            assert axis == x.dim() - found.rank - 1


@pytest.mark.parametrize("target", targets(Projects), ids=str)
def test_projects(target: Any) -> None:
    at = 1 if target == aten.addmm.default else 0
    x = CASES[target][at]
    assert follows(of(target, CASES[target], at), x, [*same(x)[:-1], None])
    assert channel_axis(view(node_of(target, CASES[target]))) == -1


@pytest.mark.parametrize("target", targets(Convolves), ids=str)
def test_convolves(target: Any) -> None:
    f, batch = of(target, CASES[target]), CASES[target][0]
    found = effect_of(target, CASES[target])
    assert isinstance(found, Convolves)
    for x in (batch, batch[0]):
        assert is_linear(f, x)
        made = node_of(target, (x, *CASES[target][1:]))
        assert made.meta["val"].shape[channel_axis(view(made))] == 5
        assert follows(f, x, [*range(x.dim() - found.rank - 1), *[None] * (found.rank + 1)])


@pytest.mark.parametrize("target", targets(LooksUp), ids=str)
def test_looks_up(target: Any) -> None:
    table, index = CASES[target]
    assert torch.equal(target(table, index), table[index])


@pytest.mark.parametrize("target", targets(Contracts), ids=str)
def test_contracts(target: Any) -> None:
    x, y = CASES[target]
    assert follows(of(target, (x, y)), x, [*same(x)[:-1], None])
    assert follows(of(target, (x, y), 1), y, [*same(y)[:-2], None, y.dim() - 1][-x.dim() :]) or y.dim() < x.dim()
    assert is_linear(of(target, (x, y)), x)
    assert is_linear(of(target, (x, y), 1), y)


@pytest.mark.parametrize("target", targets(Attends), ids=str)
def test_attends(target: Any) -> None:
    query, _, value = CASES[target]
    assert follows(of(target, CASES[target]), query, [0, 1, 2, None])
    assert follows(of(target, CASES[target], 2), value, [0, 1, None, 3])
    assert is_linear(of(target, CASES[target], 2), value)


@pytest.mark.parametrize("target", targets(Joins), ids=str)
def test_joins(target: Any) -> None:
    tensors, axis = CASES[target]
    found = effect_of(target, CASES[target])
    parts = [x.unsqueeze(axis) for x in tensors] if found == Joins(new=True) else tensors
    assert torch.equal(target(tensors, axis), torch.cat(parts, axis))


@pytest.mark.parametrize("target", targets(Gathers), ids=str)
def test_gathers(target: Any) -> None:
    x = CASES[target][0]
    picked = of(target, CASES[target])(torch.arange(x.numel()).view(x.shape))
    assert torch.equal(target(*CASES[target]), x.flatten()[picked])
    is_whole = torch.equal(picked % 10, torch.arange(10).expand_as(picked)) if picked.shape[-1] == 10 else False
    assert effect_of(target, CASES[target]) == Gathers("slices" if is_whole else "elements")


@pytest.mark.parametrize("target", targets(Scatters), ids=str)
def test_scatters(target: Any) -> None:
    found = effect_of(target, CASES[target])
    assert isinstance(found, Scatters)
    names = [argument.name for argument in target._schema.arguments]
    given = list(CASES[target])
    changed = target(*given) != given[0]
    assert changed.any()
    if found.source is None:
        assert is_homogeneous(of(target, given), given[0])
        return
    at = names.index(found.source)
    both = [2.5 * a if i in (0, at) else a for i, a in enumerate(given)]
    assert torch.allclose(target(*both), 2.5 * target(*given), rtol=1e-12, atol=0)
    assert (changed.sum() == given[at].numel()) == (target(*given)[changed].numel() == given[at].numel())


@pytest.mark.parametrize("target", targets(Pads), ids=str)
def test_pads(target: Any) -> None:
    x, found = CASES[target][0], effect_of(target, CASES[target])
    assert isinstance(found, Pads)
    assert found.value is not None
    made = of(target, CASES[target])(torch.ones(x.shape, dtype=torch.float64) * 7)
    assert sorted(made.unique().tolist()) == [found.value, 7]
    assert (made == 7).sum() == x.numel()


def test_pads_with_own_elements() -> None:
    assert effect_of(aten.pad.default, (X, [1, 1], "replicate")) == Pads(None)
    assert effect_of(aten.pad.default, (X, [1, 1], "constant", 2.0)) == Pads(2.0)


@pytest.mark.parametrize("target", targets(ReadsShape), ids=str)
def test_reads_shape(target: Any) -> None:
    found = effect_of(target, CASES[target])
    assert isinstance(found, ReadsShape)
    given = CASES[target]
    made = target(*given)
    if isinstance(given[0], Tensor):
        again = target(r(*given[0].shape), *given[1:])
        assert torch.equal(made, again) if isinstance(made, Tensor) else made == again
    if found.value is not None:
        assert made.unique().tolist() == [found.value]


def test_dropouts_copy_in_evaluation_alone() -> None:
    for target, training in (
        (aten.dropout.default, Homogeneous()),
        (aten.feature_dropout.default, Homogeneous()),
        (aten.alpha_dropout.default, Opaque()),
        (aten.feature_alpha_dropout.default, Opaque()),
    ):
        assert effect_of(target, (X, 0.5, False)) == Copies()
        assert effect_of(target, (X, 0.5, True)) == training


def test_other_ops() -> None:
    assert effect_of(aten.where.self, (X > 0, X, -X)) == Elementwise()
    assert effect_of(aten.histc.default, (X,)) == Opaque()
    assert effect_of(aten.rand_like.default, (X,)) == Opaque()
    graph = fx.Graph()
    assert effect(view(graph.placeholder("x"))) == Opaque()
    assert effect(view(graph.call_module("observers.0"))) == Observes()


def pointwise() -> list[OpOverload]:
    """The ops of one tensor that torch tags as pointwise, and this table does not list."""
    found: list[OpOverload] = []
    for name in dir(aten):
        packet = getattr(aten, name)
        for overload in getattr(packet, "overloads", list)():
            op = getattr(packet, overload)
            required = [a for a in op._schema.arguments if not a.has_default_value()]
            is_functional = not op._schema.is_mutable and not name.endswith("backward")
            if torch.Tag.pointwise in op.tags and len(required) == 1 and is_functional and op not in EFFECTS:
                found.append(op)
    assert len(found) > 50
    return found


def test_what_torch_calls_pointwise_is() -> None:
    for op in pointwise():
        for x in (r(3, 5), torch.randint(0, 2, (3, 5), generator=G).bool()):
            try:
                op(x)
            except (RuntimeError, NotImplementedError, ValueError):  # not of this dtype
                continue
            if effect_of(op, (x,)) == Elementwise():
                assert follows(op, x.double() if x.is_floating_point() else x, same(x)), op
