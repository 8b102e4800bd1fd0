"""graphq: a quantization compiler for PyTorch models. Any spec dialect in, one graph in the middle, any target out."""

from typing import TYPE_CHECKING, Any

from graphq.errors import GraphError, GraphqError, PassError, SpecError, TargetError

if TYPE_CHECKING:
    from graphq.comparison.driver import diff
    from graphq.compiler import Compiled, compile  # noqa: A004
    from graphq.conversion import convert_checkpoint
    from graphq.data import evaluate
    from graphq.explanation import compare, explain
    from graphq.frontends import convert_spec, load_spec, write_spec
    from graphq.in_place.quantizer import convert, in_place_report, quantize
    from graphq.ir.text import dump
    from graphq.linter.lint import lint
    from graphq.linter.report import LintReport
    from graphq.lowering.torch.module import load
    from graphq.mixed_precision.driver import search
    from graphq.numerics.codec import decode, encode, fake_quantize
    from graphq.spec.rules import Spec
    from graphq.verifier import verify

_HOMES = {
    "Compiled": "graphq.compiler",
    "decode": "graphq.numerics.codec",
    "encode": "graphq.numerics.codec",
    "fake_quantize": "graphq.numerics.codec",
    "compare": "graphq.explanation",
    "compile": "graphq.compiler",
    "diff": "graphq.comparison.driver",
    "explain": "graphq.explanation",
    "convert_checkpoint": "graphq.conversion",
    "convert_spec": "graphq.frontends",
    "load_spec": "graphq.frontends",
    "write_spec": "graphq.frontends",
    "convert": "graphq.in_place.quantizer",
    "in_place_report": "graphq.in_place.quantizer",
    "quantize": "graphq.in_place.quantizer",
    "lint": "graphq.linter.lint",
    "LintReport": "graphq.linter.report",
    "load": "graphq.lowering.torch.module",
    "search": "graphq.mixed_precision.driver",
    "verify": "graphq.verifier",
    "Spec": "graphq.spec.rules",
    "dump": "graphq.ir.text",
}

__all__ = [
    "Compiled",
    "GraphError",
    "GraphqError",
    "LintReport",
    "PassError",
    "Spec",
    "SpecError",
    "TargetError",
    "compare",
    "compile",
    "convert",
    "convert_checkpoint",
    "convert_spec",
    "decode",
    "diff",
    "dump",
    "encode",
    "evaluate",
    "explain",
    "fake_quantize",
    "in_place_report",
    "lint",
    "load",
    "load_spec",
    "quantize",
    "search",
    "verify",
    "write_spec",
]


def __getattr__(name: str) -> Any:
    """The public functions, imported when they are first used: importing graphq costs next to nothing."""
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name == "evaluate":
        return importlib.import_module("graphq.data.evaluate")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
