"""The ONNX target: QDQ models with true integer initializers named by FQN, in the lowest opset their types allow.

torch's exporter translates the QDQ form; graphq's ops and integer types are ours. A causal language model takes and
gives its key/value cache under the names that optimum and onnxruntime-genai use.
"""

import logging
import re
import warnings
from collections.abc import Container, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, fx
from torch._dynamo.exc import UserError
from torch._ops import OpOverload

from graphq import numerics
from graphq.artifacts import manifest
from graphq.capture.export import dynamic_shapes, lean_export
from graphq.capture.source import PAST, SEQUENCE, Source, source_of, with_total
from graphq.errors import TargetError
from graphq.files import whole_directory
from graphq.ir.views import Dequantize, Op, Param, ops_of, view
from graphq.lowering.legalize import Limits, legalize, where
from graphq.lowering.onnx import genai
from graphq.lowering.onnx.caches import holds_scales
from graphq.lowering.onnx.decompositions import lean_decompositions
from graphq.lowering.onnx.form import onnx_form, with_bytes
from graphq.lowering.onnx.names import check_names, name_nodes, name_outputs, restore_names
from graphq.lowering.onnx.promotions import lean_promotions
from graphq.lowering.onnx.shapes import fix_sizes
from graphq.lowering.onnx.spellings import spell
from graphq.lowering.onnx.tensors import NAME, Initializers
from graphq.lowering.onnx.torchlib import kept_translations
from graphq.lowering.profiles import profile_named
from graphq.runtime.onnx_session import OnnxSession
from graphq.spec.formats import Float, Int
from graphq.state import same_tensors

_DATA: Final = "model.onnx.data"
FILES: Final = (NAME, _DATA)
_INLINE_BYTES: Final = 1 << 30  # protobuf ends at 2 GiB
_SAMPLE: Final = {SEQUENCE: 3, PAST: 5}


def _refuses(op: Op) -> str | None:
    if rate := _dropped(op):
        return f"{op.node.target} drops {rate:g} of its input at random in evaluation, too, which is not exported"
    if not isinstance(op, Dequantize):
        return None
    if op.scale.val.dtype == torch.float64:
        return "its scales are float64, ONNX's are float32 at most; compile the model in float32"
    match numerics.parse_format(op.format):
        case Int() | Float("float8_e4m3fn" | "float8_e5m2"):
            return None
        case format if not isinstance(op.codes, Param):
            return f"{format}: this target holds activations in integers, float8_e4m3fn and float8_e5m2"
        case Float("hifloat8" | "float4_e1m2") as format:
            return f"{format}: ONNX has no type for it"
        case _:
            return None


def _dropped(op: Op) -> float:
    """The share of elements that an op sets to 0 at random."""
    target = op.node.target
    if not isinstance(target, OpOverload):
        return 0.0
    names = {argument.name for argument in target._schema.arguments}  # pyright: ignore[reportPrivateUsage]
    if "dropout_p" in names:
        return float(op.argument("dropout_p"))
    if "dropout" not in str(target) or not {"p", "train"} <= names or not op.argument("train"):
        return 0.0
    return float(op.argument("p"))


LIMITS: Final = Limits("onnx", _refuses)


def emit(
    gm: fx.GraphModule,
    path: str | Path,
    made_from: Mapping[str, Any],
    *,
    overwrite: bool = False,
    cache: bool = True,
    opset: int | None = None,
    bfloat16: bool = False,
    profile: str | None = None,
    shapes: Mapping[str, int] | None = None,
) -> tuple[str, ...]:
    """The QDQ form ``gm`` as ``model.onnx`` in the directory ``path``, written whole or not at all. Gives notes on
    sizes that the consumer wants fixed and how layers are spelled, and on a language model that onnxruntime-genai
    cannot serve.

    ``cache=False`` leaves the key/value cache out of a causal language model. ``shapes`` fixes dimensions by name: the
    file has numbers in their place, and constants for what follows from them. ``opset``: the one to write, by default
    the lowest that holds the model. A model that computes in bfloat16 is refused unless ``bfloat16``. ``profile``: the
    consumer whose spellings of linears are written (``graphq.lowering.onnx.spellings``). Large models keep their
    tensors in ``model.onnx.data``. Raises ``TargetError`` naming op and layer for what ONNX, or an opset that was asked
    for, cannot hold, for an opset that is never written, and for an existing ``path``; ``SpecError`` for a profile that
    there is not.
    """
    import onnx
    import onnx_ir as ir
    from onnx_ir.passes import common

    from graphq.lowering.onnx.constants import hold_constants
    from graphq.lowering.onnx.element_types import set_types
    from graphq.lowering.onnx.norms import divide_by_roots, split_norms
    from graphq.lowering.onnx.opset import HIGHEST, LOWEST, RMS_NORM, check_opset, lower_opset
    from graphq.lowering.onnx.pads import fold_pads
    from graphq.lowering.onnx.zero_points import complete

    consumer = None if profile is None else profile_named(profile)
    lowest, highest = (LOWEST, HIGHEST) if consumer is None else consumer.opsets
    whole = {"RMSNormalization"} & (set[str]() if consumer is None else consumer.ops.keys())  # which it has as one op
    if opset is not None:
        check_opset(opset)
        if not lowest <= opset <= highest:
            raise TargetError(f"onnx: opset {opset}: {profile} reads {lowest} to {highest}")
    elif consumer is not None:
        lowest = max(lowest, consumer.opset)
    legalize(gm, LIMITS)
    if not bfloat16:
        _refuse_bfloat16(gm)
    check_names(gm)
    notes: list[str] = []
    prepared = onnx_form(gm, cache, () if consumer is None else consumer.float_weights, notes.append)
    fix_sizes(prepared, {} if shapes is None else shapes)
    if consumer is not None and consumer.static:
        free = ", ".join(name for name, low, high in source_of(prepared).ranges if low != high)
        notes += [f"onnx: {profile} wants sizes that are fixed, by shapes; these are free: {free}"] if free else []
    spelled = prepared if consumer is None else spell(prepared, consumer, notes.append)
    model = _export(with_bytes(spelled))
    restore_names(model, spelled)
    _share_tied(model, spelled)
    set_types(model, spelled, opset or highest)
    _name_dimensions(model, spelled)
    held = spelled.state_dict().keys()
    _fold(model, {name for name in held if not name.startswith("constants.")})
    may_be_empty = {name for name, low, _ in source_of(prepared).ranges if not low}
    if opset is None and any(one.op_type in whole for one in model.graph):
        lowest = max(lowest, RMS_NORM)
    lower_opset(model, may_be_empty, opset, (lowest, highest))
    if consumer is not None and consumer.splits_norms:
        split_norms(model)
        divide_by_roots(model)
    common.RemoveUnusedNodesPass()(model)
    complete(model, held)
    fold_pads(model)
    hold_constants(model)
    common.RemoveUnusedNodesPass()(model)
    if source_of(prepared).fixed:
        common.ShapeInferencePass()(model)  # of the values that were made on the way here
    name_outputs(model, source_of(prepared))
    name_nodes(model)
    common.ClearMetadataAndDocStringPass()(model)  # the exporter's traces hold the source's paths
    with whole_directory(path, overwrite, manifest.sources(gm)) as directory:
        size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
        ir.save(model, directory / NAME, external_data=_DATA if size > _INLINE_BYTES else None)
        onnx.checker.check_model(str(directory / NAME), full_check=True)
        notes += genai.write(directory, prepared)
        spelled_for = {} if profile is None else {"profile": profile}
        manifest.write(directory, prepared, "onnx", {**made_from, **spelled_for}, Initializers(directory))
    return tuple(notes)


def open_session(directory: Path, source: Source) -> OnnxSession:
    """The artifact in ONNX Runtime. Raises ``TargetError`` for one that it cannot load."""
    return OnnxSession(directory / NAME, source)


def _refuse_bfloat16(gm: fx.GraphModule) -> None:
    """Raises ``TargetError`` naming the first layer that computes in bfloat16, for which runtimes lack kernels."""
    for op in ops_of(gm):
        val = op.node.meta.get("val")
        is_narrow = isinstance(val, Tensor) and val.dtype == torch.bfloat16 and op.node.op == "call_function"
        if is_narrow and not holds_scales(op):
            raise TargetError(
                f"onnx: {where(op)}: computes in bfloat16, which ONNX Runtime has no kernels for on the CPU; compile"
                " with dtype=torch.float32, or pass bfloat16=True for a runtime that has them"
            )


def _samples(source: Source) -> tuple[Tensor, ...]:
    sizes = with_total({name: max(low, min(high, _SAMPLE.get(name, 2))) for name, low, high in source.ranges})
    return tuple(
        torch.ones([sizes[d] if isinstance(d, str) else d for d in i.shape], dtype=i.dtype) for i in source.inputs
    )


def _export(gm: fx.GraphModule) -> Any:
    from graphq.lowering.onnx.ops import translations

    source = source_of(gm)
    ranges = {name: (low, high) for name, low, high in source.ranges}
    lean = (lean_export(), kept_translations(), lean_decompositions(), lean_promotions())
    with warnings.catch_warnings(), _quiet_exporter(), lean[0], lean[1], lean[2], lean[3], torch.no_grad():
        warnings.simplefilter("ignore")
        shapes = dynamic_shapes(source.inputs, ranges)
        export = partial(torch.export.export, gm, _samples(source), dynamic_shapes=shapes, strict=False)
        try:
            try:
                exported = export()
            except UserError:  # conditions that hold for all sizes, which capture has proved, are asserted instead
                exported = export(prefer_deferred_runtime_asserts_over_guards=True)
        except UserError as error:
            raise TargetError(f"onnx: {str(error).strip().splitlines()[0]}") from error
        try:
            program = torch.onnx.export(
                exported,
                custom_translation_table=translations(exported.graph_signature.user_inputs),
                input_names=[i.name for i in source.inputs],
                output_names=list(source.outputs),
                opset_version=18,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
        except Exception as error:  # the exporter raises many types; each becomes one line that names op and layer
            raise TargetError(f"onnx: {_explain(error, exported.graph_module)}") from error
    assert program is not None
    return program.model


def _explain(error: BaseException, exported: fx.GraphModule) -> str:
    texts: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        texts.append(str(cause))
        cause = cause.__cause__
    text = "\n".join(texts)
    nodes = {node.name: node for node in exported.graph.nodes}
    if failed := re.search(r"translating node %(\w+) :.*?\(args = \((.*?)\)", text):
        # The exporter decomposes ops further; then the failed one stands for a reader of what it reads.
        read = [nodes[name] for name in re.findall(r"%(\w+)", failed[2]) if name in nodes]
        for node in (nodes.get(failed[1]), *(user for seen in read for user in seen.users)):
            if node is not None and node.op == "call_function":
                return f"{where(view(node))}: torch's exporter cannot translate {node.target}"
    found = re.search(r"No ONNX function found for (.*?)[.\n]", text)
    return found[0] if found else texts[0].strip().splitlines()[0]


class _quiet_exporter:  # noqa: N801
    """The exporter's advice about optional packages and its own attributes is held back."""

    def __enter__(self) -> None:
        self.levels = [
            (logger, logger.level) for logger in map(logging.getLogger, ("torch.onnx", "onnx_ir", "onnxscript"))
        ]
        for logger, _ in self.levels:
            logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        for logger, level in self.levels:
            logger.setLevel(level)


def _fold(model: Any, held: Container[str]) -> None:
    """Sizes and constants are computed, and equal computations merged; what reads a tensor ``held`` by the graph stays,
    so that codes stay codes.
    """
    from onnx_ir.passes import common
    from onnxscript import optimizer

    def keep(node: Any) -> bool | None:
        """Whether a node stays although its inputs are known."""
        reads = any(value is not None and value.name in held for value in node.inputs)
        return False if reads or node.op_type == "DequantizeLinear" else None

    optimizer.fold_constants_ir(model, onnx_shape_inference=True, should_fold=keep)
    common.RemoveUnusedNodesPass()(model)
    common.CommonSubexpressionEliminationPass()(model)


def _share_tied(model: Any, gm: fx.GraphModule) -> None:
    """A tensor that the graph holds under several names, such as a tied output head, is one initializer."""
    import onnx_ir as ir

    for name, kept in same_tensors(gm).items():
        if {name, kept} <= model.graph.initializers.keys():
            other = model.graph.initializers.pop(name)
            ir.convenience.replace_all_uses_with(other, model.graph.initializers[kept])


def _name_dimensions(model: Any, gm: fx.GraphModule) -> None:
    """Dynamic dimensions carry the names that capture declared."""
    import onnx_ir as ir

    names: dict[str, str] = {}
    for value, declared in zip(model.graph.inputs, source_of(gm).inputs, strict=True):
        for size, name in zip(value.shape, declared.shape, strict=True):
            if isinstance(name, str) and not isinstance(size, int):
                names.setdefault(str(size.value), name)
    by_symbol = {re.compile(rf"\b{re.escape(symbol)}\b"): name for symbol, name in names.items()}
    seen = [*model.graph.inputs, *(output for node in model.graph for output in node.outputs)]
    for value in seen:
        if value.shape is None:
            continue
        sizes: list[Any] = []
        for size in value.shape:
            text = size if isinstance(size, int) else str(size.value)
            if not isinstance(text, int):
                for symbol, name in by_symbol.items():
                    text = symbol.sub(name, text)
                text = int(text) if text.isdigit() else text  # an expression of which a number is left
            sizes.append(text)
        value.shape = ir.Shape(sizes)
