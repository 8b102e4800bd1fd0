"""Layouts of scales: values worked out by hand, the formats' golden values, round trips, errors."""

import inspect
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from graphq.errors import PassError
from graphq.packing import (
    pack_hif4_scales,
    pair_scales,
    scale_to_word,
    unpack_hif4_scales,
    unpair_scales,
    word_to_scale,
)


def test_pairs_worked_out_by_hand() -> None:
    # N = 2 output channels, K = 128: four blocks of 32 each, so two pairs. Pair 0 holds blocks 0 and 1 of both channels.
    scale = torch.tensor([[120, 121, 122, 123], [130, 131, 132, 133]], dtype=torch.uint8)
    paired = pair_scales(scale)
    assert paired.tolist() == [[[120, 121], [130, 131]], [[122, 123], [132, 133]]]
    assert paired.is_contiguous()
    assert unpair_scales(paired).tolist() == scale.tolist()
    experts = pair_scales(torch.stack([scale, scale + 1]))
    assert torch.equal(experts, torch.stack([paired, paired + 1]))


@given(st.lists(st.integers(0, 3), max_size=1), st.integers(0, 5), st.integers(0, 4))
def test_unpair_is_the_inverse_of_pair(experts: list[int], out: int, pairs: int) -> None:
    scale = torch.randint(0, 256, (*experts, out, 2 * pairs), generator=torch.Generator().manual_seed(out))
    scale = scale.to(torch.uint8)
    paired = pair_scales(scale)
    assert paired.shape == (*experts, pairs, out, 2)
    back = unpair_scales(paired)
    assert torch.equal(back, scale)
    spread = unpair_scales(torch.stack([paired, paired], -1)[..., 0])
    assert spread.is_contiguous()
    assert torch.equal(spread, scale)


def test_words_worked_out_by_hand() -> None:
    # 1 is 0 01111111 0...: 127 << 23 = 1065353216. 1.5 adds the highest bit of the fraction, 1 << 22.
    scale = torch.tensor([1.0, 1.5, 0.0])
    words = scale_to_word(scale)
    assert words.dtype == torch.int64
    assert words.tolist() == [127 << 23, (127 << 23) + (1 << 22), 0]


# Ascend's description: deq_scale = input_scale 0.05 times weight_scale [0.01, 0.02], and single values.
def test_golden_words() -> None:
    deq_scale = torch.tensor(0.05) * torch.tensor([0.01, 0.02])
    assert scale_to_word(deq_scale).tolist() == [973279855, 981668463]
    scale = torch.tensor([1.0, 0.01, 0.00125])
    assert scale_to_word(scale).tolist() == [1065353216, 1008981770, 983815946]
    assert torch.equal(word_to_scale(torch.tensor([1065353216, 1008981770, 983815946])), scale)


@given(st.lists(st.integers(0, 3), max_size=3), st.integers(0, 99))
def test_words_keep_every_bit_of_a_scale(shape: list[int], seed: int) -> None:
    bits = torch.randint(0, 1 << 31, shape, generator=torch.Generator().manual_seed(seed))
    scale = bits.to(torch.int32).view(torch.float32)
    assert torch.equal(scale_to_word(scale), bits)
    back = word_to_scale(bits)
    assert back.dtype == torch.float32
    assert torch.equal(back.view(torch.int32), scale.view(torch.int32))  # not-a-numbers too


def bits(*places: int, of: int) -> Tensor:
    """A 1 at each of these places."""
    found = torch.zeros(of, dtype=torch.uint8)
    found[list(places)] = 1
    return found


# AMCT's golden blocks: (E6M2 byte, places of the 1s in level 2 and in level 3, the four bytes).
HIF4: list[tuple[int, tuple[int, ...], tuple[int, ...], list[int]]] = [
    (184, tuple(range(8)), tuple(range(16)), [184, 255, 255, 255]),  # all 1.875
    (0, (), (), [0, 0, 0, 0]),  # zeros
    (192, (0,), (0,), [192, 128, 128, 0]),  # 7 and 63 zeros: the first bit of each level is its byte's highest
    (255, (), (), [255, 0, 0, 0]),  # an infinity
    # a ramp from -31.5 to 31.5: 0b11000011; 0b11111100, 0b00111111
    (200, (0, 1, 6, 7), (0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15), [200, 195, 252, 63]),
    (195, (0, 1), (1, 3), [195, 192, 80, 0]),  # 1, -2, 3, 4, 5, 6, 7, -8, .5, ...: 0b11000000; 0b01010000
]


@pytest.mark.parametrize(("scale", "level2", "level3", "expected"), HIF4)
def test_golden_hif4_scales(scale: int, level2: tuple[int, ...], level3: tuple[int, ...], expected: list[int]) -> None:
    parts = torch.tensor([scale], dtype=torch.uint8), bits(*level2, of=8), bits(*level3, of=16)
    packed = pack_hif4_scales(*parts)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [expected]
    for back, part in zip(unpack_hif4_scales(packed), parts, strict=True):
        assert torch.equal(back, part)


def test_hif4_scales_of_two_blocks() -> None:
    # Bits 8 to 15 of level 2 and 16 to 31 of level 3 are block 1's.
    packed = pack_hif4_scales(torch.tensor([1, 2], dtype=torch.uint8), bits(7, 8, of=16), bits(15, 16, 24, of=32))
    assert packed.tolist() == [[1, 0x01, 0x00, 0x01], [2, 0x80, 0x80, 0x80]]


@given(st.lists(st.integers(0, 3), max_size=2), st.integers(0, 4), st.integers(0, 99))
def test_unpack_hif4_scales_is_the_inverse(rows: list[int], blocks: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = [
        torch.randint(0, most, (*rows, size), generator=generator).to(torch.uint8)
        for most, size in ((256, blocks), (2, 8 * blocks), (2, 16 * blocks))
    ]
    packed = pack_hif4_scales(*parts)
    assert packed.shape == (*rows, blocks, 4)
    for back, part in zip(unpack_hif4_scales(packed), parts, strict=True):
        assert back.is_contiguous()
        assert torch.equal(back, part)


def refuses(message: str):
    return pytest.raises(PassError, match=f"^packing: {re.escape(message)}$")


def zeros(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def test_refuses_scales_that_do_not_pair() -> None:
    pair, unpair = inspect.unwrap(pair_scales), inspect.unwrap(unpair_scales)  # without the tests' own check of shapes
    with refuses("scales of shape (4, 3), not [..., out, an even number of blocks]"):
        pair(zeros(4, 3))
    with refuses("scales of shape (4,), not [..., out, an even number of blocks]"):
        pair(zeros(4))
    with refuses("torch.float32, not torch.uint8"):
        pair(zeros(4, 4, dtype=torch.float32))
    with refuses("paired scales of shape (4, 3, 3), not [..., pairs, out, 2]"):
        unpair(zeros(4, 3, 3))
    with refuses("paired scales of shape (4, 2), not [..., pairs, out, 2]"):
        unpair(zeros(4, 2))
    with refuses("torch.int8, not torch.uint8"):
        unpair(zeros(4, 4, 2, dtype=torch.int8))


def test_refuses_scales_without_words() -> None:
    to_word, to_scale = inspect.unwrap(scale_to_word), inspect.unwrap(word_to_scale)
    with refuses("a scale of -0.5; 64-bit words hold positive scales"):
        to_word(torch.tensor([1.0, -0.5]))
    with refuses("a scale of -0.0; 64-bit words hold positive scales"):
        to_word(torch.tensor(-0.0))
    with refuses("torch.float16, not torch.float32"):
        to_word(zeros(1, dtype=torch.float16))
    for word in (1 << 31, 1 << 32, -1):
        with refuses("a word holds more than the bits of a positive float32 scale"):
            to_scale(torch.tensor([0, word]))
    with refuses("torch.int32, not torch.int64"):
        to_scale(zeros(1, dtype=torch.int32))


def test_refuses_hif4_scales() -> None:
    bare_pack, bare_unpack = inspect.unwrap(pack_hif4_scales), inspect.unwrap(unpack_hif4_scales)
    with refuses("levels of shapes (8,) and (16,) to scales of shape (2,); a block has 8 and 16"):
        bare_pack(zeros(2), zeros(8), zeros(16))
    with refuses("levels of shapes (1, 8) and (1, 8) to scales of shape (1, 1); a block has 8 and 16"):
        bare_pack(zeros(1, 1), zeros(1, 8), zeros(1, 8))
    with refuses("levels of shapes (2, 8) and (1, 16) to scales of shape (1, 1); a block has 8 and 16"):
        bare_pack(zeros(1, 1), zeros(2, 8), zeros(1, 16))
    with refuses("codes from 0 to 2; 1 bits hold 0 to 1"):
        bare_pack(zeros(1), zeros(8), 2 * bits(0, of=16))
    with refuses("torch.int8, not torch.uint8"):
        bare_pack(zeros(1), zeros(8, dtype=torch.int8), zeros(16))
    with refuses("HiF4 scales of shape (4, 3), not [..., blocks, 4]"):
        bare_unpack(zeros(4, 3))
    with refuses("HiF4 scales of shape (4,), not [..., blocks, 4]"):
        bare_unpack(zeros(4))
    with refuses("torch.int8, not torch.uint8"):
        bare_unpack(zeros(1, 4, dtype=torch.int8))
