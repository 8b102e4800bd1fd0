"""Attention by the library gives what torch's gives, and leaves to torch what it must."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from graphq.runtime import kernels
from graphq.runtime.kernels import attention, native
from graphq.runtime.kernels import scaled_dot_product_attention as attend
from graphq.runtime.kernels.attention import LEAST, MOST_QUERIES


@pytest.fixture(autouse=True, scope="module")
def of_any_size() -> Generator[None]:
    """The library computes small ones, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "LEAST", dict.fromkeys(LEAST, 0))
        yield


pytestmark = pytest.mark.skipif(native.library() is None, reason=native.NOT_BUILT)
LEVELS: list[kernels.Limit] = ["portable", "avx2", "all"]


@contextmanager
def calls() -> Generator[list[int]]:
    """How many calls of the library there were."""
    found: list[int] = []
    library = native.library()
    run = library.graphq_attention
    library.graphq_attention = lambda *given: (found.append(1), run(*given))[1]
    try:
        yield found
    finally:
        library.graphq_attention = run


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def operands(heads: int = 4, groups: int = 2, queries: int = 1, tokens: int = 20, width: int = 32) -> list[Tensor]:
    return [
        random(2, heads, queries, width),
        random(2, heads // groups, tokens, width, seed=1),
        random(2, heads // groups, tokens, width, seed=2),
    ]


def wanted(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """In float64, with keys and values repeated."""
    count = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(count, 1) for x in (k, v))
    mask = mask if mask is None or mask.dtype == torch.bool else mask.double()
    return F.scaled_dot_product_attention(q.double(), k, v, mask, scale=scale)


def assert_near(y: Tensor, expected: Tensor, bound: float) -> None:
    assert y.shape == expected.shape
    assert (y.double() - expected).abs().max() <= bound * expected.abs().max()


@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, MOST_QUERIES), st.integers(1, 600),
    st.sampled_from([(16, 16), (64, 64), (80, 48), (128, 112)]), st.sampled_from([None, "bool", "added", "each"]),
    st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([None, 0.3]), st.sampled_from([1, 2]),
    st.sampled_from(LEVELS), st.integers(0, 99),
)  # fmt: skip
@settings(deadline=None, max_examples=200)
def test_gives_what_torch_gives(
    kv_heads: int, count: int, queries: int, tokens: int, widths: tuple[int, int], kind: str | None,
    dtype: torch.dtype, scale: float | None, threads: int, limit: kernels.Limit, seed: int,
) -> None:  # fmt: skip
    heads, (width, v_width) = kv_heads * count, widths
    q = random(2, queries, heads, width, seed=seed).to(dtype).transpose(1, 2)
    room = random(2, kv_heads, tokens + 9, width, seed=seed + 1).to(dtype)
    k, v = room[:, :, :tokens], random(2, kv_heads, tokens, v_width, seed=seed + 2).to(dtype)
    mask = None
    if kind is not None:
        shape = (2, heads, queries, tokens) if kind == "each" else (2, 1, queries, tokens)
        mask = random(*shape, seed=seed + 3) > -0.5
        mask[..., -1] = True
        mask = mask if kind == "bool" else random(*shape, seed=seed).to(dtype).masked_fill(~mask, -torch.inf)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode(), kernels.using(limit), calls() as ran:
            y = attend(q, k, v, mask, scale=scale, enable_gqa=True)
    finally:
        torch.set_num_threads(before)
    assert ran
    assert y.dtype == dtype
    assert_near(y, wanted(q, k, v, mask, scale), 2e-6 if dtype == torch.float32 else 2.0**-8)


def test_a_query_without_tokens_is_0_as_in_torch() -> None:
    q, k, v = operands(queries=2)
    mask = torch.ones(2, 1, 2, 20, dtype=torch.bool)
    mask[:, :, 1] = False
    for one in (mask, torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)):
        with calls() as ran:
            y = attend(q, k, v, one, enable_gqa=True)
        assert ran
        assert not y[:, :, 1].any()
        assert_near(y[:, :, :1], wanted(q[:, :, :1], k, v), 2e-6)


def test_what_is_not_finite_stays_so() -> None:
    q, k, v = operands()
    k[0, 0, 3, 5] = torch.nan
    v[1, 1, 3, 5] = torch.inf
    y = attend(q, k, v, enable_gqa=True)
    assert y[0, :2].isnan().all()
    assert y[0, 2:].isfinite().all()
    assert y[1].isfinite().logical_not().nonzero().tolist() == [[2, 0, 5], [3, 0, 5]]


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("limit", LEVELS)
def test_a_mask_hides_what_torchs_hides(kind: torch.dtype, value: float, limit: kernels.Limit) -> None:
    """Scores that are no numbers stay so under it, of one chunk and of several."""
    for tokens in (20, 300):
        q, k, v = operands(tokens=tokens)
        k[0, 0, 3], v[1, 1, 3, 5], k[0, 1, 4, 0] = value, value, -value
        mask = torch.ones(2, 1, 1, tokens, dtype=torch.bool)
        mask[..., 3:5] = False
        mask = mask if kind == torch.bool else torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
        with kernels.using(limit), calls() as ran:
            y = attend(q, k, v, mask, enable_gqa=True)
        assert ran
        assert torch.equal(y.isfinite(), wanted(q, k, v, mask).isfinite())
        assert torch.equal(y.isnan(), wanted(q, k, v, mask).isnan())


def test_hidden_chunks_take_no_part() -> None:
    """The first ones, whose largest score is that of no token, and the last ones."""
    q, k, v = operands(queries=2, tokens=900)
    for first in (0, 15, 255, 256, 257, 600, 899):
        mask = torch.zeros(2, 1, 2, 900, dtype=torch.bool)
        mask[0, :, 0, first], mask[0, :, 1, first:], mask[1, :, 0, : first + 1] = True, True, True
        y = attend(q, k, v, mask, enable_gqa=True)
        assert not y[1, :, 1].any()
        assert_near(y, wanted(q, k, v, mask), 2e-6)


def test_views_of_a_cache_are_read_as_they_lie() -> None:
    q, k, v = operands(queries=2)
    room, one = random(2, 2, 40, 33, seed=7), random(1, 2, 20, 32, seed=8)
    views = [
        room[:, :, :20, 1:], room[:, :, ::2, :32], room.flip(3)[:, :, 20:, :32], one.expand(2, 2, 20, 32),
        k[:, :1].expand(2, 2, 20, 32), k[:, :, :1].expand(2, 2, 20, 32), room.transpose(0, 1)[:, :, 5:25, :32],
        random(2, 20, 2, 32).transpose(1, 2), random(20, 2, 2, 32).permute(1, 2, 0, 3),
    ]  # fmt: skip
    mask = random(1, 1, 1, 60)[..., ::3]
    for view in views:
        for keys, values in ((view, v), (k, view), (view, view)):
            with calls() as ran:
                y = attend(q, keys, values, mask, enable_gqa=True)
            assert ran
            assert_near(y, wanted(q, keys, values, mask), 2e-6)


def test_threads_change_no_bytes() -> None:
    q, k, v = operands(heads=12, groups=2, queries=4, tokens=500)
    before, found = torch.get_num_threads(), list[Tensor]()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(attend(q, k, v, enable_gqa=True))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_compiled_call_is_one_graph() -> None:
    q, k, v = operands()
    compiled: Any = torch.compile(attend, backend="eager", fullgraph=True)
    assert_near(compiled(q, k, v, enable_gqa=True), wanted(q, k, v), 2e-6)


def test_large_scores_do_not_overflow() -> None:
    q, k, v = operands(tokens=400)
    k[:, :, 300] = q[:, ::2, 0] * 100
    y = attend(q * 100, k, v, enable_gqa=True)
    assert_near(y, wanted(q * 100, k, v), 2e-6)


def test_its_rows_lie_token_by_token() -> None:
    q, k, v = operands(queries=3)
    y = attend(q, k, v, enable_gqa=True)
    assert y.transpose(1, 2).is_contiguous()  # as torch's, of which graphs take views


@pytest.mark.parametrize("dtype", LEAST)
def test_small_ones_are_left_to_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "LEAST", LEAST)
    least = LEAST[dtype] // (2 * 2 * 32)  # tokens of two batches and two heads
    for tokens in (least - 1, least):
        q, k, v = (x.to(dtype) for x in operands(tokens=tokens))
        with calls() as ran:
            attend(q, k, v, enable_gqa=True)
        assert bool(ran) == (tokens == least)


class Passing(TorchDispatchMode):
    """Sees each op."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_what_is_left_to_torch() -> None:
    q, k, v = operands()
    mask = torch.ones(1, 1, 1, 20, dtype=torch.bool)
    many, few = operands(queries=MOST_QUERIES + 1), operands(width=8)
    turned = k.transpose(2, 3).contiguous().transpose(2, 3)
    empty = torch.empty(2, 2, 0, 32)
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((*many,), {}), ((*few,), {}), ((q, turned, v), {}), ((q.double(), k.double(), v.double()), {}),
        ((q[:, :2], k, v), {"is_causal": True}), ((q, k, v, mask[0, 0]), {}), ((q.half(), k.half(), v.half()), {}),
        ((q, empty, empty), {}), ((q.requires_grad_(), k, v), {}), ((q.detach()[0], k[0], v[0]), {}),
    ]  # fmt: skip
    for args, kwargs in given:
        with calls() as ran:
            y = attend(*args, enable_gqa=True, **kwargs)
        assert not ran
        assert torch.equal(y, F.scaled_dot_product_attention(*args, enable_gqa=True, **kwargs))
    q = q.detach()
    with calls() as ran:
        with Passing():
            attend(q, k, v, enable_gqa=True)
        with torch.autocast("cpu", torch.bfloat16):
            attend(q, k, v, enable_gqa=True)
        with kernels.using("torch"):
            attend(q, k, v, enable_gqa=True)
    assert not ran
    with pytest.raises((RuntimeError, ValueError)):
        attend(q, k, v)  # heads differ
    with pytest.raises((RuntimeError, ValueError)):
        attend(q, k, v, torch.ones(2, 3, 1, 20, dtype=torch.bool), enable_gqa=True)
