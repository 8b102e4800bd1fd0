"""Every format that can be written stands in the tables that the tests and the benchmark of formats go through."""

import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import ml_dtypes
import pytest
import torch

from graphq.errors import SpecError
from graphq.numerics import elements
from graphq.spec import formats
from graphq.spec.formats import (
    BIAS_BITS,
    INT_BITS,
    NAMED_FORMATS,
    Divisor,
    ExponentRule,
    FloatLayout,
    Format,
    Int,
    Mx,
    MxElement,
    TwoLevel,
    code_bits,
    element_name,
)
from graphq.spec.quant import parse_quant
from tests.lowering import test_conformance as conformance
from tests.numerics import tables, test_elements, test_elements_foreign, test_integers, test_laws, test_mx

ROOT = Path(__file__).parents[2]
FLOATS = set(get_args(FloatLayout))
NAN = {element for element in FLOATS if elements.has_nan(element)}
WITHOUT_A_FOREIGN_LIBRARY = {"float4_e1m2", "hifloat8", "e8m0"}


def kind(format: Format) -> tuple[type, str]:
    """The class of a format and that of its codes, whatever rule chooses its scale."""
    return type(format), element_name(format)


def kinds(quants: Iterable[str | None]) -> set[tuple[type, str]]:
    return {kind(parse_quant(text).format) for text in quants if text is not None}


EVERY = {kind(format) for format in NAMED_FORMATS.values()} | {(Int, f"int{bits}") for bits in INT_BITS}


def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("formats_benchmark", ROOT / "benchmarks" / "formats.py")
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_class_of_format_has_a_name() -> None:
    assert {cls for cls, _ in EVERY} == set(get_args(Format))
    assert {element for cls, element in EVERY if cls is Mx} == set(get_args(MxElement))
    assert {element for cls, element in EVERY if cls is TwoLevel} == set(get_args(get_type_hints(TwoLevel)["element"]))


def test_every_bit_width_of_integers() -> None:
    accepted: list[int] = []
    for bits in range(-1, 40):
        try:
            accepted.append(Int(bits).bits)
        except SpecError:
            continue
    assert accepted == [*INT_BITS, BIAS_BITS]
    assert {(f.bits, f.symmetric) for f in test_integers.FORMATS} == {(b, s) for b in INT_BITS for s in (True, False)}
    assert {format.divisor for format in test_integers.FORMATS} == set(get_args(Divisor))


def test_no_spec_asks_for_the_bits_of_a_bias() -> None:
    """So that weights, activations and ``graphq.encode`` never have them; tests/passes/test_quantize_biases.py does."""
    with pytest.raises(
        SpecError, match=r"^bits: 32 are those of biases, which a profile decides on; write 2 to 8 or 16$"
    ):
        parse_quant("int32/tensor")
    others: tuple[Callable[[], Int], ...] = (
        lambda: Int(BIAS_BITS, symmetric=False),
        lambda: Int(BIAS_BITS, divisor="half"),
        lambda: Int(BIAS_BITS, signed=False, symmetric=False),
    )
    for other in others:
        with pytest.raises(SpecError, match="bits: 32 are those of a bias, whose codes are signed and symmetric"):
            other()


@pytest.mark.parametrize("format", [*NAMED_FORMATS.values(), *(Int(bits) for bits in INT_BITS)], ids=str)
def test_the_laws_hold_for_it(format: Format) -> None:
    assert format in test_laws.FORMATS


def test_the_laws_hold_for_every_way_of_integers() -> None:
    ints = [format for format in test_laws.FORMATS if isinstance(format, Int)]
    assert {format.divisor for format in ints} == set(get_args(Divisor))
    assert {(format.signed, format.joint) for format in ints if not format.symmetric} == {
        (signed, joint) for signed in (True, False) for joint in (True, False)
    }


def test_every_element_has_a_table_and_its_cases() -> None:
    assert {*tables.MINIFLOATS} == {*tables.BITS} == {*elements.MINIFLOATS}
    assert {*tables.MINIFLOATS, "hifloat8", "e8m0"} == {*elements.ELEMENTS}
    assert {*elements.ELEMENTS} - {"e8m0"} == FLOATS
    assert {*test_elements.WITH_NAN} == NAN
    assert {*test_elements.WITHOUT_NAN} == FLOATS - NAN | {"int4", "uint8"}
    judged = {*test_elements_foreign.TORCH, *test_elements_foreign.ML_DTYPES}
    assert judged | WITHOUT_A_FOREIGN_LIBRARY == {*elements.ELEMENTS}
    assert not judged & WITHOUT_A_FOREIGN_LIBRARY
    for judge, found in ((torch, test_elements_foreign.TORCH), (ml_dtypes, test_elements_foreign.ML_DTYPES)):
        assert {e for e in elements.MINIFLOATS if hasattr(judge, e) or hasattr(judge, f"{e}fn")} == {*found}


def test_every_shared_exponent_has_its_cases() -> None:
    assert {format.element for format in test_mx.ALL} == {*test_mx.EMAX} == set(get_args(MxElement))
    assert {format.rule for format in test_mx.ALL} == set(get_args(ExponentRule))


def test_every_format_goes_through_every_target() -> None:
    pairs = [*conformance.ACTIVATIONS, *conformance.FLOATS, *conformance.REFERENCE, *conformance.TORCH_ONLY]
    weights = kinds([*conformance.WEIGHT_ONLY, *(weight for weight, _ in pairs)])
    assert EVERY - weights - kinds(activation for _, activation in pairs) == set()
    sixteen_bits = {found for found in EVERY if "16" in found[1]}  # of activations alone
    assert EVERY - weights == sixteen_bits


def test_the_benchmark_shows_every_format() -> None:
    shown = kinds(text for plan in benchmark().PLANS for text in plan)
    assert {found for found in EVERY - shown if found[0] is not Int} == set()
    timed = {(cls, code_bits(parse_quant(text).format)) for text in benchmark().TIMED for cls, _ in kinds([text])}
    every = {(type(format), code_bits(format)) for format in NAMED_FORMATS.values()} - {(Int, 16)}
    assert every - timed == set()


def test_the_documents_name_every_format() -> None:
    specs, numbers = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("specs.md", "numbers.md"))
    grammar = specs.split("### Formats")[1].split("```")[1]
    table = numbers.split("## Number formats")[1].split("\n\n")[2]
    named = {name for name in NAMED_FORMATS if "/" not in name or "/over_" in name}
    assert {name for name in named if f'"{name}"' not in grammar} == set()
    assert {name for name in named if f"`{name}`" not in table} == set()
    assert all(f'"{bits}"' in grammar for bits in INT_BITS)
    assert {name for name in named if f"``{name}" not in str(formats.__doc__)} == set()
