"""Which kernel is chosen, by the table alone: as if the processor had other instructions than it has."""

import ctypes
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from graphq.errors import GraphqError
from graphq.runtime.kernels import choice, native
from graphq.runtime.kernels.choice import Choice, choose

CPU = torch.device("cpu")


def chosen(inputs: str, device: torch.device = CPU, **form: object) -> Choice:
    given = {"size": 100, "group": 32, "is_integer": True, "is_supported": True} | form
    return choose(inputs, device, **given)  # pyright: ignore[reportArgumentType]


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(native, "library", object)
    return monkeypatch


@pytest.mark.parametrize(
    ("levels", "inputs", "wanted"),
    [
        (native.LEVELS, "int8", "int8 tiles (AVX-512 VNNI)"),
        (native.LEVELS, "bfloat16", "bfloat16 tiles (AVX-512 BF16)"),
        (native.LEVELS, "float32", "float32 tiles (AVX-512)"),
        (native.LEVELS, "float16", "float32 tiles (AVX-512)"),
        (("portable", "avx2", "avx512"), "int8", "int8 tiles (AVX2): no avx512_vnni"),
        (("portable", "avx2", "avx512"), "bfloat16", "float32 tiles (AVX-512): no avx512_bf16"),
        (("portable", "avx2"), "float32", "float32 tiles (AVX2): no avx512"),
        (("portable",), "int8", "int8 tiles (portable): no avx512_vnni"),
        (("portable",), "bfloat16", "float32 tiles (portable): no avx512_bf16"),
    ],
)
def test_the_first_row_that_the_processor_can_run(
    processor: pytest.MonkeyPatch, levels: tuple[str, ...], inputs: str, wanted: str
) -> None:
    processor.setattr(native, "levels", lambda: frozenset(levels))
    assert str(chosen(inputs)) == wanted


def test_rows_of_torch(processor: pytest.MonkeyPatch) -> None:
    processor.setattr(native, "levels", lambda: frozenset(native.LEVELS))
    assert chosen("float32", torch.device("meta")).why == "no kernel for meta"
    assert chosen("float64").why == "float32 does not hold its numbers"
    assert chosen("float32", is_supported=False).why == "float32 does not hold its numbers"
    assert chosen("float32", group=7).why == "tiles of groups of 7 would be mostly padding"
    assert chosen("float32", group=8).why == ""
    assert chosen("int8", group=1 << 15).why == ""
    assert chosen("int8", group=(1 << 15) + 1).why == "int32 does not hold sums of 32769 products"
    assert chosen("float32", group=1 << 20).why == ""
    assert chosen("int8", is_integer=False).why == "its codes are floats"
    assert chosen("float32", size=0).why == "it has no codes"
    processor.setattr(native, "library", lambda: None)
    processor.setattr(native, "absence", lambda: native.NOT_BUILT)
    assert chosen("float32").why == native.NOT_BUILT


def test_an_unknown_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.VARIABLE, "sse2")
    choice._from_environment.cache_clear()
    try:
        with pytest.raises(GraphqError, match="GRAPHQ_KERNELS: sse2 is not one of torch, portable, avx2, avx512, all"):
            choice.features()
        monkeypatch.setenv(choice.VARIABLE, "avx2")
        assert choice.features() == native.levels() & {"portable", "avx2"}
    finally:
        choice._from_environment.cache_clear()


def test_onednn_has_int8_by_int8_with_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.zeros(16, 32, dtype=torch.int8)
    monkeypatch.setattr(native, "levels", lambda: frozenset(native.LEVELS))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert choice.integer_kernel(weight) == choice.KERNELS[0]
    assert choice.integer_kernel(torch.zeros(1, (1 << 15) + 1, dtype=torch.int8)) is None
    assert choice.integer_kernel(weight[:0]) is None
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert choice.integer_kernel(weight) is None
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(native, "levels", lambda: frozenset({"portable", "avx2"}))
    assert choice.integer_kernel(weight) is None


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> Generator[pytest.MonkeyPatch]:
    native._loaded.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    native._loaded.cache_clear()


@pytest.mark.parametrize("found", ["missing.so", "text.so"])
def test_a_library_that_cannot_be_loaded_is_told(unloaded: pytest.MonkeyPatch, tmp_path: Path, found: str) -> None:
    (tmp_path / "text.so").write_text("no library")
    unloaded.setattr(native, "_file", lambda: tmp_path / found)
    assert native.library() is None
    assert chosen("float32").why.startswith(f"graphq's kernels cannot be loaded: {tmp_path / found}")


@pytest.mark.parametrize("version", [2, native._ABI + 1])
def test_a_library_of_other_sources_is_told(unloaded: pytest.MonkeyPatch, tmp_path: Path, version: int) -> None:
    unloaded.setattr(native, "_file", lambda: tmp_path / "old.so")
    unloaded.setattr(ctypes, "CDLL", lambda path: SimpleNamespace(graphq_abi=lambda: version))
    assert native.library() is None
    why = f"were built from other sources (version {version}, not {native._ABI}): install graphq again"
    assert str(chosen("float32")) == f"rows expanded by torch: graphq's kernels {why}"


def test_without_a_library_it_was_not_built(unloaded: pytest.MonkeyPatch) -> None:
    unloaded.setattr(native, "_file", lambda: None)
    assert native.library() is None
    assert chosen("float32").why == native.NOT_BUILT
