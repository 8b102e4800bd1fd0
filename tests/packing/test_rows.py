"""Packed rows: bytes worked out by hand, round trips, sizes."""

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from graphq.errors import PassError
from graphq.packing import pack, packed_size, unpack

# Each row of codes as its bit string, the last code first, so that the bits read as the bytes do from the right.
BY_HAND = [
    (2, [1, -2, 0, -1], [0b11_00_10_01]),
    (2, [1, -2, 0, -1, -1], [0b11_00_10_01, 0b00_00_00_11]),
    (3, [1, -4, 3], [0b11_100_001, 0b0000000_0]),  # 3 is 011: its low two bits end byte 0, its high 0 begins byte 1
    (3, [-1, -1, -1], [0b11_111_111, 0b0000000_1]),
    (3, [0, 1, 2, 3, -4, -3, -2, -1], [0b10_001_000, 0b1_100_011_0, 0b111_110_10]),
    (4, [1, -8], [0b1000_0001]),
    (4, [7, -1, -5], [0b1111_0111, 0b0000_1011]),
    (5, [-16, 15], [0b111_10000, 0b000000_01]),
    (5, [1, 2, 3, 4, 5, 6, 7, -1], [0b010_00001, 0b0_00011_00, 0b0101_0010, 0b11_00110_0, 0b11111_001]),
    (6, [-32, 31, 1, -1], [0b11_100000, 0b0001_0111, 0b111111_00]),
    (7, [-64, 63], [0b1_1000000, 0b00_011111]),
    (8, [-128, 127, -1, 0], [0b10000000, 0b01111111, 0b11111111, 0]),
]


@pytest.mark.parametrize(("bits", "codes", "expected"), BY_HAND)
def test_bytes_worked_out_by_hand(bits: int, codes: list[int], expected: list[int]) -> None:
    packed = pack(torch.tensor(codes, dtype=torch.int8), bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == expected
    assert unpack(packed, bits, len(codes)).tolist() == codes


# The bit patterns of unsigned codes and of floats: the same bytes as those of the int8 codes with these bits.
PATTERNS_BY_HAND = [
    (2, [1, 2, 0, 3, 3], [0b11_00_10_01, 0b00_00_00_11]),
    (3, [1, 4, 3], [0b11_100_001, 0b0000000_0]),
    (4, [0, 1, 0b1_01_0, 0b1_11_1], [0x10, 0xFA]),  # float4 e2m1: 0, .5, -1, -6
    (4, [15, 8, 7], [0x8F, 0x07]),
    (6, [0b1_11_111, 0, 0b0_01_000, 1], [0b00_111111, 0b1000_0000, 0b000001_00]),  # float6 e2m3: -7.5, 0, 1, .125
    (8, [255, 0, 128], [255, 0, 128]),
]


@pytest.mark.parametrize(("bits", "codes", "expected"), PATTERNS_BY_HAND)
def test_bytes_of_bit_patterns(bits: int, codes: list[int], expected: list[int]) -> None:
    packed = pack(torch.tensor(codes, dtype=torch.uint8), bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == expected
    back = unpack(packed, bits, len(codes), torch.uint8)
    assert back.dtype == torch.uint8
    assert back.tolist() == codes


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_code_survives_in_every_place(bits: int) -> None:
    codes = torch.arange(-(1 << (bits - 1)), 1 << (bits - 1)).to(torch.int8)
    rows = torch.stack([codes.roll(shift) for shift in range(8)])
    assert torch.equal(unpack(pack(rows, bits), bits, codes.numel()), rows)
    patterns = rows.view(torch.uint8) & ((1 << bits) - 1)
    assert torch.equal(pack(patterns, bits), pack(rows, bits))
    assert torch.equal(unpack(pack(rows, bits), bits, codes.numel(), torch.uint8), patterns)


def test_higher_bits_of_int8_codes_are_cut_off() -> None:
    assert pack(torch.tensor([9, -9], dtype=torch.int8), 4).tolist() == [
        0x79
    ]  # 0b1001; 0b1111_0111 without its high half
    assert pack(torch.tensor([9, -9], dtype=torch.int8), 3).tolist() == [0b00_111_001]


@pytest.mark.parametrize(("bits", "code"), [(2, 4), (4, 16), (7, 255)])
def test_refuses_bit_patterns_with_higher_bits(bits: int, code: int) -> None:
    with pytest.raises(PassError, match=f"^packing: codes from 1 to {code}; {bits} bits hold 0 to {(1 << bits) - 1}$"):
        pack(torch.tensor([1, code], dtype=torch.uint8), bits)


@st.composite
def rows_of_codes(draw) -> tuple[Tensor, int]:
    bits = draw(st.integers(2, 8))
    shape = [*draw(st.lists(st.integers(0, 4), max_size=2)), draw(st.integers(0, 19))]
    count = int(torch.tensor(shape).prod())
    half = 1 << (bits - 1)
    codes = draw(st.lists(st.integers(-half, half - 1), min_size=count, max_size=count))
    return torch.tensor(codes, dtype=torch.int8).reshape(shape), bits


@given(rows_of_codes())
def test_unpack_is_the_inverse_of_pack(drawn: tuple[Tensor, int]) -> None:
    codes, bits = drawn
    packed = pack(codes, bits)
    count = codes.shape[-1]
    assert packed.shape == (*codes.shape[:-1], (count * bits + 7) // 8)
    back = unpack(packed, bits, count)
    assert back.dtype == torch.int8
    assert back.shape == codes.shape
    assert torch.equal(back, codes)


@given(rows_of_codes())
def test_bits_after_the_last_code_are_0(drawn: tuple[Tensor, int]) -> None:
    codes, bits = drawn
    used = codes.shape[-1] * bits % 8
    if used:
        assert (pack(codes, bits)[..., -1] >> used == 0).all()


def test_packed_size() -> None:
    assert [packed_size(count, 4) for count in (0, 1, 2, 3, 128)] == [0, 1, 1, 2, 64]
    assert [packed_size(count, 3) for count in (1, 2, 3, 8, 9)] == [1, 1, 2, 3, 4]
    assert [packed_size(10, bits) for bits in range(2, 9)] == [3, 4, 5, 7, 8, 9, 10]


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_need_not_be_contiguous(bits: int) -> None:
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (5, 7), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    packed = pack(codes.t(), bits)
    assert packed.is_contiguous()
    assert torch.equal(packed, pack(codes.t().contiguous(), bits))


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 16])
def test_refuses_other_widths(bits: int) -> None:
    with pytest.raises(PassError, match=f"{bits} bits; codes of 2 to 8 bits are packed"):
        pack(torch.zeros(8, dtype=torch.int8), bits)
    with pytest.raises(PassError, match=f"{bits} bits; codes of 2 to 8 bits are packed"):
        unpack(torch.zeros(8, dtype=torch.uint8), bits, 1)


@pytest.mark.parametrize(("bits", "count", "expected"), [(8, 5, 5), (4, 5, 3), (4, 9, 5), (3, 11, 5)])
def test_refuses_rows_of_another_length(bits: int, count: int, expected: int) -> None:
    with pytest.raises(PassError, match=f"4 bytes a row; {count} codes take {expected}"):
        unpack(torch.zeros(2, 4, dtype=torch.uint8), bits, count)


def test_refuses_codes_that_are_no_bytes() -> None:
    bare_pack, bare_unpack = inspect.unwrap(pack), inspect.unwrap(unpack)  # without the tests' own check of shapes
    with pytest.raises(PassError, match=r"^packing: torch.int16, not torch.int8 or torch.uint8$"):
        bare_pack(torch.zeros(2, 4, dtype=torch.int16), 8)
    with pytest.raises(PassError, match=r"^packing: torch.int8, not torch.uint8$"):
        bare_unpack(torch.zeros(2, 4, dtype=torch.int8), 4, 8)
    with pytest.raises(PassError, match=r"^packing: torch.int16, not torch.int8 or torch.uint8$"):
        bare_unpack(torch.zeros(2, 4, dtype=torch.uint8), 4, 8, torch.int16)
