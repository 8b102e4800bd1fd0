"""Other formats' words: bytes worked out by hand, the formats' golden values, a model in Python's integers, errors."""

import inspect
import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from graphq.errors import PassError
from graphq.packing import AWQ_ORDER, pack_flat, pack_words, unpack_flat, unpack_words

I8, U8, I32 = torch.int8, torch.uint8, torch.int32
CT: dict[str, Any] = {"word": I32, "offset_binary": True, "pad": True}  # compressed-tensors pack-quantized


def signed(bits: int) -> int:
    """The int32 that has these 32 bits."""
    return bits - (1 << 32) if bits >> 31 else bits


# Words are written as their bits, the last code first, so that they read from the right as they are stored.
BY_HAND: dict[str, tuple[torch.dtype, Any, int, dict[str, Any], Any]] = {
    # -4..3 are stored as 0..7; the third code from the right of word 0 is number 2. Code 10 is 1, stored as 5 = 0b101:
    # its low bits 01 fill word 0, its highest begins word 1.
    "compressed-tensors, 3 bits": (
        I8, [[-3, -2, -1, 0, 1, 2, 3, -4, -3, -2, 1]], 3, CT,
        [[0b01_010_001_000_111_110_101_100_011_010_001, 0b1]],
    ),
    # The same codes: ten to a word, the two highest bits unused.
    "compressed-tensors before 0.18, 3 bits": (
        I8, [[-3, -2, -1, 0, 1, 2, 3, -4, -3, -2, 1]], 3, CT | {"straddle": False},
        [[0b00_010_001_000_111_110_101_100_011_010_001, 0b101]],
    ),
    "compressed-tensors, 1 bit": (I8, [[-1, 0, 0, -1, 0]], 1, CT, [[0b1_0_1_1_0]]),
    "compressed-tensors, 2 bits": (I8, [[-2, -1, 0, 1, 1]], 2, CT, [[0b11_11_10_01_00]]),
    "compressed-tensors, 4 bits": (
        I8, [[-8, -7, -6, -5, -4, -3, -2, -1], [0, 1, 2, 3, 4, 5, 6, 7]], 4, CT, [[0x76543210], [signed(0xFEDCBA98)]],
    ),
    "compressed-tensors, 4 bits, a short row": (I8, [[-8, 7, 0]], 4, CT, [[0x8F0]]),
    # Seven 5-bit codes take 35 bits: code 6 is 15, stored as 0b11111, two of its bits in word 0.
    "compressed-tensors, 5 bits": (
        I8, [[-16, -15, 0, 1, -1, -16, 15]], 5, CT, [[signed(0b11_00000_01111_10001_10000_00001_00000), 0b111]],
    ),
    "compressed-tensors, 8 bits": (I8, [[-128, -127, 127, 0, 1]], 8, CT, [[signed(0x80FF0100), 0x81]]),
    # Zero points [3, 2] along the output channels: column 0 is stored as 0, 8, 9, column 1 as 15, 7, 10.
    "compressed-tensors, zero points": (I8, [[-8, 7], [0, -1], [1, 2]], 4, CT | {"axis": 0}, [[0x980, 0xA7F]]),
    # nvfp4, mxfp4: 0, .5, -1, -6 and, from msModelSlim's own tests, the same; a small negative value is -0, code 8.
    "float4 pairs": (U8, [[0, 1, 10, 15]], 4, {"word": U8}, [[16, 250]]),
    "float4 -0": (U8, [[8, 0]], 4, {"word": U8}, [[0x08]]),
    # mxfp6: -7.5 = 0b1_11_111, 0, 1 = 0b0_01_000, .125 = 1; four codes in three bytes.
    "float6 fours": (U8, [[63, 0, 8, 1]], 6, {"word": U8}, [[0b00_111111, 0b1000_0000, 0b000001_00]]),
    # Ascend W4A8_DYNAMIC: byte[j, k] = q[2j, k] & 15 | (q[2j+1, k] & 15) << 4; the description's golden value. By hand:
    # -8 = 0b1000 low, 3 = 0b0011 high: 0x38 = 56; 7 low, -1 = 0b1111 high: 0xF7 = -9.
    "Ascend int4": (I8, [[-8, 7], [3, -1], [0, 1], [-4, 5]], 4, {"word": I8, "axis": 0}, [[56, -9], [-64, 81]]),
    "Ascend int4, one pair": (I8, [1, 2], 4, {"word": I8}, [33]),
    "Ascend int4, two experts": (
        I8, [[[-8], [3]], [[7], [-1]]], 4, {"word": I8, "axis": -2}, [[[0x38]], [[-9]]],
    ),
    # AMCT int8[K, N/2]: -7 = 0b1001 low, 5 = 0b0101 high.
    "AMCT int4 in bytes": (I8, [[-7, 5]], 4, {"word": I8}, [[0b0101_1001]]),
    # AMCT's deploy ONNX packs a convolution's [N, K, 1, 1] along K.
    "AMCT int4 of a convolution": (I8, [[[[1]], [[2]]]], 4, {"word": I8, "axis": 1}, [[[[0x21]]]]),
    # AMCT int32[K, N/8]: nibbles 1, F, 2, E, 3, D, 4, C from the lowest.
    "AMCT int4 along N": (I8, [[1, -1, 2, -2, 3, -3, 4, -4]], 4, {"word": I32}, [[signed(0xC4D3E2F1)]]),
    # AMCT mxfp4 int32[K/8, N] of [K, N] = [8, 2].
    "AMCT mxfp4 along K": (
        U8, [[0, 15], [1, 14], [2, 13], [3, 12], [4, 11], [5, 10], [6, 9], [7, 8]], 4, {"word": I32, "axis": 0},
        [[0x76543210, signed(0x89ABCDEF)]],
    ),
    # AMCT HiF4's golden block [1, -2, 3, 4, 5, 6, 7, -8, .5, .25, .125, .0625, 10, -11, 12, 13]: the codes of what it
    # becomes, [1, -2, 3, 5, 3, 3, 4, -5, 1, 0, 0, 0, 6, -6, 7, 7] as sign and magnitude; and that of 1.875s.
    "AMCT HiF4": (
        U8, [1, 10, 3, 5, 3, 3, 4, 13, 1, 0, 0, 0, 6, 14, 7, 7], 4, {"word": U8}, [161, 83, 51, 212, 1, 0, 230, 119],
    ),
    "AMCT HiF4, all 1.875": (U8, [7, 7], 4, {"word": U8}, [0x77]),
    # AutoAWQ: nibble i from the lowest holds channel [0, 2, 4, 6, 1, 3, 5, 7][i].
    "AutoAWQ": (U8, [[0, 1, 2, 3, 4, 5, 6, 7]], 4, {"word": I32, "order": AWQ_ORDER}, [[0x75316420]]),
    "AutoAWQ, two words": (
        U8, [[15, 0, 0, 0, 0, 0, 0, 1, 8, 9, 10, 11, 12, 13, 14, 15]], 4, {"word": I32, "order": AWQ_ORDER},
        [[0x1000000F, signed(0xFDB9ECA8)]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_words_worked_out_by_hand(name: str) -> None:
    dtype, given, bits, layout, expected = BY_HAND[name]
    codes = torch.tensor(given, dtype=dtype)
    words = pack_words(codes, bits, **layout)
    assert words.dtype == layout["word"]
    assert words.tolist() == expected
    back = unpack_words(words, bits, codes.shape[layout.get("axis", -1)], dtype=dtype, **reading(layout))
    assert back.dtype == dtype
    assert back.tolist() == given


def reading(layout: dict[str, Any]) -> dict[str, Any]:
    """What ``unpack_words`` takes of this layout: the words have their dtype, and the count says where they end."""
    return {key: value for key, value in layout.items() if key not in ("word", "pad")}


# ONNX packs the flattened tensor.
FLAT_BY_HAND: list[tuple[torch.dtype, Any, int, list[int]]] = [
    (I8, [[1, -2, 3]], 4, [0xE1, 0x03]),  # INT4: an odd last one in the low nibble
    (U8, [[15], [1]], 4, [0x1F]),  # UINT4, over the end of a row
    (U8, [[0, 1, 10], [15, 7, 8]], 4, [0x10, 0xFA, 0x87]),  # FLOAT4E2M1: 0, .5, -1, -6, 6, -0
    (I8, [[1, -2, 0], [-1, 1, -1]], 2, [0b11_00_10_01, 0b00_00_11_01]),  # INT2
    (U8, [3, 2, 1], 2, [0b00_01_10_11]),  # UINT2
    (U8, [63, 0, 8, 1, 32], 6, [0b00_111111, 0b1000_0000, 0b000001_00, 0b100000]),  # FLOAT6E2M3
    (I8, -3, 4, [0x0D]),  # a scalar
    (I8, [], 4, []),
    (I8, [-1, 127], 8, [255, 127]),
]


@pytest.mark.parametrize(("dtype", "given", "bits", "expected"), FLAT_BY_HAND, ids=str)
def test_flat_bytes_worked_out_by_hand(dtype: torch.dtype, given: Any, bits: int, expected: list[int]) -> None:
    codes = torch.tensor(given, dtype=dtype)
    packed = pack_flat(codes, bits)
    assert packed.dtype == U8
    assert packed.tolist() == expected
    back = unpack_flat(packed, bits, codes.shape, dtype)
    assert back.dtype == dtype
    assert back.tolist() == given


def fill(bits: int, width: int, straddle: bool, order: tuple[int, ...] | None) -> int:
    """The smallest number of codes that fills whole words in whole runs of the order."""
    codes = width // math.gcd(bits, width) if straddle else width // bits
    return math.lcm(codes, len(order or (0,)))


@st.composite
def layouts(draw) -> tuple[Tensor, int, dict[str, Any]]:
    bits, dtype = draw(st.integers(1, 8)), draw(st.sampled_from([I8, U8]))
    layout: dict[str, Any] = {
        "word": draw(st.sampled_from([U8, I8, I32])),
        "offset_binary": dtype == I8 and draw(st.booleans()),
        "order": draw(st.sampled_from([None, (0,), (1, 0), AWQ_ORDER, (2, 0, 1)])),
        "straddle": draw(st.booleans()),
        "pad": draw(st.booleans()),
    }
    unit = fill(bits, 8 * layout["word"].itemsize, layout["straddle"], layout["order"])
    if layout["pad"]:
        unit = len(layout["order"] or (0,))
    count = unit * draw(st.integers(0, max(1, 40 // unit)))
    shape = draw(st.lists(st.integers(0, 3), max_size=2))
    place = draw(st.integers(0, len(shape)))
    shape.insert(place, count)
    layout["axis"] = place - draw(st.sampled_from([0, len(shape)]))
    low = 0 if dtype == U8 else -(1 << (bits - 1))
    seed = draw(st.integers(0, 99))
    codes = torch.randint(low, low + (1 << bits), shape, generator=torch.Generator().manual_seed(seed))
    return codes.to(dtype), bits, layout


def packed_by_integers(codes: Tensor, bits: int, layout: dict[str, Any]) -> Tensor:
    """The words as the digits, to the base of a word, of the integer whose digits to the base of a code are the codes."""
    width, order, half = 8 * layout["word"].itemsize, layout["order"] or (0,), (1 << bits) >> 1
    per_word = width // bits
    lanes = codes.movedim(layout["axis"], -1)
    found: list[list[int]] = []
    for lane in lanes.reshape(-1, lanes.shape[-1]).tolist() if lanes.numel() else []:
        run = [lane[start + place] for start in range(0, len(lane), len(order)) for place in order]
        stored = [(code + half if layout["offset_binary"] else code) % (1 << bits) for code in run]
        runs = [stored] if layout["straddle"] else [stored[i : i + per_word] for i in range(0, len(stored), per_word)]
        words: list[int] = []
        for part in runs:
            number = sum(code << (bits * place) for place, code in enumerate(part))
            words += [(number >> shift) % (1 << width) for shift in range(0, len(part) * bits, width)]
        found.append([word - (1 << width) if layout["word"] != U8 and word >> (width - 1) else word for word in words])
    count = lanes.shape[-1]
    size = -(-count * bits // width) if layout["straddle"] else -(-count // per_word)
    return torch.tensor(found, dtype=layout["word"]).reshape(*lanes.shape[:-1], size).movedim(-1, layout["axis"])


@given(layouts())
def test_words_are_digits_of_an_integer_and_unpack_is_the_inverse(drawn: tuple[Tensor, int, dict[str, Any]]) -> None:
    codes, bits, layout = drawn
    before = codes.clone()
    words = pack_words(codes, bits, **layout)
    assert words.is_contiguous()
    assert words.dtype == layout["word"]
    assert torch.equal(words, packed_by_integers(codes, bits, layout))
    count = codes.shape[layout["axis"]]
    back = unpack_words(words, bits, count, dtype=codes.dtype, **reading(layout))
    assert back.is_contiguous()
    assert back.dtype == codes.dtype
    assert torch.equal(back, before)
    assert torch.equal(codes, before)


@given(layouts())
def test_codes_and_words_need_not_be_contiguous(drawn: tuple[Tensor, int, dict[str, Any]]) -> None:
    codes, bits, layout = drawn
    spread = torch.stack([codes, codes], -1)[..., 0]
    words = pack_words(spread, bits, **layout)
    assert torch.equal(words, pack_words(codes, bits, **layout))
    spread = torch.stack([words, words], -1)[..., 0]
    back = unpack_words(spread, bits, codes.shape[layout["axis"]], dtype=codes.dtype, **reading(layout))
    assert torch.equal(back, codes)


def test_a_strided_single_word() -> None:
    words = torch.tensor([0x76543210, 0, 1], dtype=I32)[::2][:1]  # contiguous, and its stride is 2
    assert unpack_words(words, 4, 8).tolist() == list(range(8))
    assert pack_words(torch.arange(6, dtype=U8)[::3][1:], 8, U8).tolist() == [3]
    assert pack_words(torch.arange(6, dtype=U8)[::3][1:], 8, I32, pad=True).tolist() == [3]


@given(layouts())
def test_both_readings_of_the_same_words(drawn: tuple[Tensor, int, dict[str, Any]]) -> None:
    codes, bits, layout = drawn
    if layout["offset_binary"]:
        return
    words = pack_words(codes, bits, **layout)
    count, mask = codes.shape[layout["axis"]], (1 << bits) - 1
    patterns = unpack_words(words, bits, count, dtype=U8, **reading(layout))
    numbers = unpack_words(words, bits, count, dtype=I8, **reading(layout))
    assert torch.equal(patterns, codes.view(U8) & mask)
    assert torch.equal(numbers.view(U8) & mask, patterns)
    assert torch.equal(numbers < 0, patterns >> (bits - 1) == 1)


@given(layouts())
def test_widths_that_divide_a_word_never_straddle(drawn: tuple[Tensor, int, dict[str, Any]]) -> None:
    codes, bits, layout = drawn
    if 8 * layout["word"].itemsize % bits:
        return
    del layout["straddle"]
    assert torch.equal(pack_words(codes, bits, **layout), pack_words(codes, bits, **layout, straddle=False))


@given(st.integers(0, 2), st.integers(0, 3), st.integers(0, 5), st.integers(0, 99))
def test_ascend_bytes_seen_as_int32_are_eight_channels_of_one_column(e: int, n: int, k: int, seed: int) -> None:
    # vLLM-Ascend reads [E, N/2, K] so: transposes to [E, K, N/2] and views four bytes as one int32.
    codes = torch.randint(-8, 8, (e, 8 * n, k), generator=torch.Generator().manual_seed(seed)).to(I8)
    packed = pack_words(codes, 4, I8, axis=-2)
    assert packed.shape == (e, 4 * n, k)
    seen = packed.transpose(1, 2).contiguous().flatten().view(I32).reshape(e, k, n)
    assert torch.equal(seen, pack_words(codes.transpose(1, 2), 4, I32))


@given(st.lists(st.integers(0, 4), max_size=3), st.integers(1, 8), st.booleans(), st.integers(0, 99))
def test_unpack_flat_is_the_inverse_of_pack_flat(shape: list[int], bits: int, unsigned: bool, seed: int) -> None:
    low = 0 if unsigned else -(1 << (bits - 1))
    codes = torch.randint(low, low + (1 << bits), shape, generator=torch.Generator().manual_seed(seed))
    codes = codes.to(U8 if unsigned else I8)
    packed = pack_flat(codes, bits)
    assert packed.shape == (-(-codes.numel() * bits // 8),)
    back = unpack_flat(packed, bits, shape, codes.dtype)
    assert back.dtype == codes.dtype
    assert back.shape == codes.shape
    assert torch.equal(back, codes)


def zeros(*shape: int, dtype: torch.dtype = I8) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


REFUSED_TO_PACK: list[tuple[Tensor, int, dict[str, Any], str]] = [
    (zeros(2, 5), 4, {"word": U8}, "5 codes of 4 bits along axis -1 do not fill words of 8 bits"),
    (zeros(5, 2), 4, {"word": I8, "axis": 0}, "5 codes of 4 bits along axis 0 do not fill words of 8 bits"),
    (zeros(2, 12), 4, {"word": I32}, "12 codes of 4 bits along axis -1 do not fill words of 32 bits"),
    (zeros(6), 6, {"word": U8}, "6 codes of 6 bits along axis -1 do not fill words of 8 bits"),
    (zeros(32), 5, {"word": I32, "straddle": False}, "32 codes of 5 bits along axis -1 do not fill words of 32 bits"),
    (zeros(1) - 2, 1, {"word": U8, "pad": True}, "codes from -2 to -2; 1 bits hold -1 to 0"),
    (zeros(8) + 8, 4, {"word": I32}, "codes from 8 to 8; 4 bits hold -8 to 7"),
    (zeros(8) - 9, 4, {"word": I32, "offset_binary": True}, "codes from -9 to -9; 4 bits hold -8 to 7"),
    (torch.tensor([-1, 1], dtype=I8), 1, {"word": U8, "pad": True}, "codes from -1 to 1; 1 bits hold -1 to 0"),
    # What corrupts the neighbouring nibbles in LLMC's AutoAWQ export, which does not look.
    (torch.arange(16, 8, -1, dtype=U8), 4, {"word": I32, "order": AWQ_ORDER}, "codes from 9 to 16; 4 bits hold 0 to 15"),
    (zeros(8), 0, {"word": I32}, "0 bits; codes of 1 to 8 bits are packed"),
    (zeros(8), 9, {"word": I32}, "9 bits; codes of 1 to 8 bits are packed"),
    (zeros(8), 4, {"word": torch.int64}, "torch.int64, not torch.uint8 or torch.int8 or torch.int32"),
    (zeros(8, 8), 4, {"word": I32, "axis": 2}, "axis 2 of a tensor with 2 axes"),
    (zeros(8, 8), 4, {"word": I32, "axis": -3}, "axis -3 of a tensor with 2 axes"),
    (zeros(), 4, {"word": I32}, "axis -1 of a tensor with 0 axes"),
    (zeros(8, dtype=U8), 4, {"word": I32, "offset_binary": True}, "torch.uint8 codes in offset binary, which stores torch.int8"),
    (zeros(4), 4, {"word": U8, "order": AWQ_ORDER}, "4 codes; they are reordered 8 at a time"),
    (zeros(8), 4, {"word": I32, "order": (0, 2)}, "order (0, 2) is no permutation of its places"),
    (zeros(8), 4, {"word": I32, "order": (1, 1)}, "order (1, 1) is no permutation of its places"),
    (zeros(8), 4, {"word": I32, "order": ()}, "order () is no permutation of its places"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("codes", "bits", "layout", "message"), REFUSED_TO_PACK, ids=[row[-1] for row in REFUSED_TO_PACK]
)
def test_refuses_to_pack(codes: Tensor, bits: int, layout: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError, match=f"^packing: {re.escape(message)}$"):
        pack_words(codes, bits, **layout)


WORDS = zeros(3, 4, dtype=I32)
REFUSED_TO_UNPACK: list[tuple[Tensor, int, int, dict[str, Any], str]] = [
    (WORDS, 4, 33, {}, "4 words of 32 bits along axis -1; 33 codes of 4 bits take 5"),
    (WORDS, 4, 24, {}, "4 words of 32 bits along axis -1; 24 codes of 4 bits take 3"),
    (WORDS, 3, 11, {"axis": 0}, "3 words of 32 bits along axis 0; 11 codes of 3 bits take 2"),
    (WORDS, 3, 42, {"straddle": False}, "4 words of 32 bits along axis -1; 42 codes of 3 bits take 5"),
    (zeros(4), 4, 9, {}, "4 words of 8 bits along axis -1; 9 codes of 4 bits take 5"),
    (zeros(4), 4, 8, {"axis": 1}, "axis 1 of a tensor with 1 axes"),
    (WORDS, 9, 8, {}, "9 bits; codes of 1 to 8 bits are packed"),
    (WORDS, 4, 32, {"dtype": I32}, "torch.int32, not torch.int8 or torch.uint8"),
    (WORDS, 4, 32, {"dtype": U8, "offset_binary": True}, "torch.uint8 codes in offset binary, which stores torch.int8"),
    (WORDS, 4, 30, {"order": AWQ_ORDER}, "30 codes; they are reordered 8 at a time"),
    (WORDS, 4, 32, {"order": (1, 2, 3)}, "order (1, 2, 3) is no permutation of its places"),
]


@pytest.mark.parametrize(("words", "bits", "count", "layout", "message"), REFUSED_TO_UNPACK, ids=[row[-1] for row in REFUSED_TO_UNPACK])  # fmt: skip
def test_refuses_to_unpack(words: Tensor, bits: int, count: int, layout: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError, match=f"^packing: {re.escape(message)}$"):
        unpack_words(words, bits, count, **layout)


def test_refuses_flat_codes_and_bytes() -> None:
    with pytest.raises(PassError, match=r"^packing: codes from 0 to 4; 2 bits hold 0 to 3$"):
        pack_flat(torch.tensor([[4, 0]], dtype=U8), 2)
    with pytest.raises(PassError, match=r"^packing: 3 words of 8 bits along axis -1; 4 codes of 4 bits take 2$"):
        unpack_flat(zeros(3, dtype=U8), 4, (2, 2))


def test_refuses_codes_and_words_of_other_dtypes() -> None:
    bare_pack, bare_unpack = inspect.unwrap(pack_words), inspect.unwrap(unpack_words)  # without the tests' own check
    with pytest.raises(PassError, match=r"^packing: torch.int32, not torch.int8 or torch.uint8$"):
        bare_pack(zeros(8, dtype=I32), 4, I32)
    with pytest.raises(PassError, match=r"^packing: torch.int64, not torch.uint8 or torch.int8 or torch.int32$"):
        bare_unpack(zeros(1, dtype=torch.int64), 4, 8)
