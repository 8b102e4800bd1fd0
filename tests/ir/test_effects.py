"""Every op of the table does what the table says: each is run on random tensors in float64."""

import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx
from torch._ops import OpOverload

from graphq.ir.effect_table import EFFECTS, axes_of, channel_axis, effect
from graphq.ir.effects import (
    Adds,
    AddsProduct,
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
from graphq.runtime.allowed_ops import OVERLOADS
from tests.ir.op_calls import CASES, CHANNELS, IMAGES, G, X, r

aten = torch.ops.aten


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


STD = (aten.std.default, aten.std.dim, aten.std.correction)  # homogeneous, which no walk asks for


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
        assert (found.of != "other") == is_homogeneous(f, x) or target in STD


@pytest.mark.parametrize(
    ("order", "of"), [(0, "other"), (0.0, "other"), *((p, "homogeneous") for p in (0.5, 1, 2, float("inf"), -1))]
)
def test_a_norm_that_counts_is_not_homogeneous(order: float, of: str) -> None:
    arguments = (X, order, [2])
    assert effect_of(aten.linalg_vector_norm.default, arguments) == Reduces(of)  # pyright: ignore[reportArgumentType]
    assert is_homogeneous(lambda x: aten.linalg_vector_norm.default(x, order, [2]), X) == (of == "homogeneous")


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


def test_a_batch_norm_in_training_mixes_the_batch() -> None:
    arguments = (IMAGES, *CHANNELS, True, 0.1, 1e-5, False)
    assert effect_of(aten.batch_norm.default, arguments) == Normalizes(1, "batch")
    f = of(aten.batch_norm.default, arguments)
    assert follows(f, IMAGES, [None, 1, None, None])
    assert not follows(f, IMAGES, [0, 1, None, None])


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
    found, arguments = effect_of(target, CASES[target]), CASES[target]
    assert isinstance(found, LooksUp)
    table, index = (
        arguments if found.indices == "indices" else (torch.eye(arguments[1], dtype=torch.int64), arguments[0])
    )
    assert torch.equal(target(*arguments), table[index])


@pytest.mark.parametrize("target", targets(Contracts), ids=str)
def test_contracts(target: Any) -> None:
    x, y = CASES[target]
    assert follows(of(target, (x, y)), x, [*same(x)[:-1], None])
    batches = [None] * (x.dim() - y.dim()) + same(y)[:-2]  # one matrix is in all of them
    assert follows(of(target, (x, y), 1), y, [*batches, None, y.dim() - 1])
    assert is_linear(of(target, (x, y)), x)
    assert is_linear(of(target, (x, y), 1), y)


@pytest.mark.parametrize("target", targets(AddsProduct), ids=str)
def test_adds_a_product(target: Any) -> None:
    found, (added, x, y, _) = effect_of(target, CASES[target]), CASES[target]
    products = x @ y
    assert isinstance(found, AddsProduct)
    made = 0.5 * added + 2.0 * (products.sum(0) if found.sums else products)
    assert torch.allclose(target(*CASES[target][:3], **named(CASES[target])), made, rtol=1e-12, atol=1e-12)


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


def test_ops_of_artifacts_that_nothing_is_known_of() -> None:
    """A new op that an artifact may hold gets a row in the table, or a place here."""
    opaque: list[str] = []
    for name, overloads in OVERLOADS.items():
        for overload in overloads.split():
            node = fx.Graph().call_function(getattr(getattr(aten, name), overload))
            if node.target not in EFFECTS and effect(view(node)) == Opaque():
                opaque.append(f"{name}.{overload}")
    assert_expected_inline(
        "\n".join(textwrap.wrap(" ".join(opaque), 116)),
        """\
_conj.default _local_scalar_dense.default _upsample_bicubic2d_aa.vec _upsample_bilinear2d_aa.vec
_upsample_nearest_exact1d.vec _upsample_nearest_exact2d.vec _upsample_nearest_exact3d.vec _weight_norm.default
_weight_norm_interface.default adaptive_max_pool1d.default adaptive_max_pool2d.default adaptive_max_pool3d.default
addmv.default addr.default adjoint.default affine_grid_generator.default all.dims any.dims atleast_1d.Sequence
atleast_1d.default atleast_2d.Sequence atleast_2d.default atleast_3d.Sequence atleast_3d.default bilinear.default
bincount.default block_diag.default broadcast_tensors.default broadcast_to.default bucketize.Scalar bucketize.Tensor
cartesian_prod.default cdist.default channel_shuffle.default col2im.default column_stack.default complex.default
concat.default concatenate.default conj.default cosine_similarity.default count_nonzero.default
count_nonzero.dim_IntList cumprod.default det.default diag.default diag_embed.default diagonal.default
diagonal_scatter.default diff.default dist.default divide.Scalar divide.Tensor dot.default dstack.default
einsum.default embedding_bag.padding_idx expand_as.default fft_fft.default fft_fft2.default fft_fftn.default
fft_fftshift.default fft_ifft.default fft_irfft.default fft_irfft2.default fft_rfft.default fft_rfft2.default
fill.Tensor fliplr.default flipud.default floor_divide.Scalar ger.default grid_sampler.default gru.input
gru_cell.default hamming_window.default hamming_window.periodic hamming_window.periodic_alpha
hamming_window.periodic_alpha_beta hann_window.default hann_window.periodic histc.default hstack.default
im2col.default imag.default index_fill.int_Scalar index_fill.int_Tensor inner.default inverse.default
isclose.default isin.Scalar_Tensor isin.Tensor_Scalar isin.Tensor_Tensor istft.default item.default kron.default
kthvalue.default linalg_cross.default linalg_det.default linalg_inv.default linalg_matrix_norm.default
linalg_matrix_norm.str_ord linalg_norm.default linalg_norm.ord_str linalg_solve.default linspace.default
logcumsumexp.default logspace.default lstm.input lstm_cell.default mH.default masked_scatter.default
masked_select.default max_pool1d_with_indices.default max_pool2d_with_indices.default
max_pool3d_with_indices.default max_unpool2d.default median.default median.dim meshgrid.indexing mode.default
msort.default multiply.Scalar multiply.Tensor mv.default nanmean.default nanmedian.default nanmedian.dim
nansum.default narrow.Tensor nonzero.default norm.Scalar norm.ScalarOpt_dim norm.ScalarOpt_dim_dtype
norm.ScalarOpt_dtype outer.default pairwise_distance.default pixel_shuffle.default pixel_unshuffle.default
polar.default quantile.default quantile.scalar ravel.default real.default renorm.default repeat_interleave.Tensor
repeat_interleave.self_Tensor reshape_as.default resolve_conj.default resolve_neg.default rnn_relu.input
rnn_relu_cell.default rnn_tanh.input rnn_tanh_cell.default rot90.default rsub.Tensor scatter.reduce
scatter.value_reduce scatter_reduce.two searchsorted.Scalar searchsorted.Tensor special_expit.default split.sizes
stft.center stft.default subtract.Scalar subtract.Tensor swapdims.default sym_stride.int take.default
take_along_dim.default tensor_split.indices tensor_split.tensor_indices_or_sections tensordot.default tile.default
to.device to.dtype_layout to.other trace.default tril_indices.default triu_indices.default true_divide.Scalar
type_as.default unfold.default unsafe_chunk.default unsafe_split.Tensor unsafe_split_with_sizes.default
upsample_bicubic2d.vec upsample_bilinear2d.vec upsample_linear1d.vec upsample_nearest1d.vec upsample_nearest2d.vec
upsample_nearest3d.vec upsample_trilinear3d.vec vdot.default view.dtype view_as.default view_as_complex.default
view_as_real.default vstack.default zero.default""",
    )


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
