"""The ONNX target: QDQ models with true integer initializers named by FQN, in the lowest opset their types allow.

torch's exporter translates the QDQ form; graphq's ops and integer types are ours. A causal language model takes and
gives its key/value cache under the names that optimum and onnxruntime-genai use.
"""

import logging
import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import Tensor, fx

from graphq import edit, numerics
from graphq.capture import dynamic_shapes
from graphq.errors import TargetError
from graphq.files import whole_directory
from graphq.lowering import manifest
from graphq.lowering.legalize import where
from graphq.lowering.pack import copy_graph
from graphq.source import KEY, PAST, SEQUENCE, TOTAL, Source, source_of
from graphq.state import put_tensor, tensor_of
from graphq.views import Dequantize, Input, Param, Quantize, ops_of, view

NAME: Final = "model.onnx"
_DATA: Final = "model.onnx.data"
_INLINE_BYTES: Final = 1 << 30  # protobuf ends at 2 GiB
_SAMPLE: Final = {SEQUENCE: 3, PAST: 5, TOTAL: 8}


def emit(
    gm: fx.GraphModule,
    path: str | Path,
    made_from: Mapping[str, Any],
    overwrite: bool = False,
    cache: bool = True,
    opset: int = 13,
) -> None:
    """The QDQ form ``gm`` as ``model.onnx`` in the directory ``path``, written whole or not at all.

    ``cache=False`` leaves the key/value cache out of a causal language model. ``opset``: the lowest to use; types may ask
    for more. Large models keep their tensors in ``model.onnx.data``. Raises ``TargetError`` naming op and layer for what
    ONNX cannot hold, and for an existing ``path``.
    """
    import onnx
    import onnx_ir as ir

    from graphq.lowering.onnx_opset import lower_opset

    prepared = _prepare(gm, cache)
    model = _export(prepared)
    _set_types(model, gm)
    _name_dimensions(model, prepared)
    _fold(model)
    lower_opset(model, {PAST}, opset)
    ir.passes.common.RemoveUnusedNodesPass()(model)
    with whole_directory(path, overwrite) as directory:
        size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
        ir.save(model, directory / NAME, external_data=_DATA if size > _INLINE_BYTES else None)
        onnx.checker.check_model(str(directory / NAME), full_check=True)
        manifest.write(directory, gm, "onnx", made_from, source_of(prepared))


def _prepare(gm: fx.GraphModule, cache: bool) -> fx.GraphModule:
    """A copy whose scales have the shapes that ONNX wants, and without a cache if that is asked for."""
    from graphq.lowering.onnx_ops import onnx_scale

    made = copy_graph(gm)
    for op in ops_of(made):
        match op:
            case Dequantize() if isinstance(op.codes, Param):
                shape = tensor_of(made, op.codes.fqn).shape
                for part in (op.scale, op.zero_point):
                    if isinstance(part, Param):
                        _set(made, part, onnx_scale(tensor_of(made, part.fqn), list(op.block), shape))
            case Quantize() if isinstance(op.scale, Param):
                for part in (op.scale, op.zero_point):
                    if isinstance(part, Param):
                        _set(made, part, tensor_of(made, part.fqn).reshape(()))
            case _:
                pass
    if not cache:
        _drop_cache(made)
    made.graph.lint()
    made.recompile()
    return made


def _set(gm: fx.GraphModule, op: Param, tensor: Tensor) -> None:
    put_tensor(gm, op.fqn, tensor)
    op.node.meta["val"] = edit.fake_mode_of(gm).from_tensor(tensor, static_shapes=True)


def _drop_cache(gm: fx.GraphModule) -> None:
    """Caches are empty constants of the batch's size, and are not given back."""
    source = source_of(gm)
    inputs = [op for op in ops_of(gm) if isinstance(op, Input)]
    first = view(inputs[-1].node.next)
    batch = edit.insert(gm, first, torch.ops.aten.sym_size.int, inputs[0], 0, by="onnx")
    for op, declared in zip(inputs, source.inputs, strict=True):
        if declared.is_cache:
            sizes = [batch if isinstance(d, str) and d != PAST else 0 if d == PAST else d for d in declared.shape]
            with gm.graph.inserting_before(first.node):
                empty = gm.graph.call_function(
                    torch.ops.aten.full.default,
                    ([s.node if not isinstance(s, int) else s for s in sizes], 0.0),
                    {"dtype": declared.dtype},
                )
            empty.meta = dict(op.node.meta)
            edit.bypass(gm, op, view(empty))
    output = next(n for n in gm.graph.nodes if n.op == "output")
    kept = [i for i, name in enumerate(source.outputs) if not name.startswith("present.")]
    output.args = (tuple(cast(Any, output.args[0])[i] for i in kept),)
    edit.drop_unused(gm)
    gm.meta[KEY] = replace(
        source,
        inputs=tuple(
            replace(i, shape=tuple(SEQUENCE if d == TOTAL else d for d in i.shape)) for i in source.inputs if not i.is_cache
        ),
        outputs=tuple(source.outputs[i] for i in kept),
        ranges=tuple(r for r in source.ranges if r[0] != PAST),
    )


def _samples(source: Source) -> tuple[Tensor, ...]:
    return tuple(
        torch.ones([_SAMPLE.get(d, 2) if isinstance(d, str) else d for d in i.shape], dtype=i.dtype) for i in source.inputs
    )


def _export(gm: fx.GraphModule) -> Any:
    from graphq.lowering.onnx_ops import translations

    source = source_of(gm)
    ranges = {name: (low, high) for name, low, high in source.ranges}
    with warnings.catch_warnings(), _quiet_exporter(), torch.no_grad():
        warnings.simplefilter("ignore")
        exported = torch.export.export(gm, _samples(source), dynamic_shapes=dynamic_shapes(source.inputs, ranges), strict=False)
        try:
            program = torch.onnx.export(
                exported,
                custom_translation_table=translations(),
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
    for name in re.findall(r"%(\w+)", text):
        node = nodes.get(name)
        if node is not None and node.op == "call_function":
            return f"{where(view(node))}: torch's exporter cannot translate {node.target}"
    found = re.search(r"No ONNX function found for (.*?)[.\n]", text)
    return found[0] if found else texts[0].strip().splitlines()[0]


class _quiet_exporter:  # noqa: N801
    """The exporter's advice about optional packages is held back."""

    def __enter__(self) -> None:
        self.logger = logging.getLogger("torch.onnx")
        self.level = self.logger.level
        self.logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        self.logger.setLevel(self.level)


def _fold(model: Any) -> None:
    """Sizes and constants are computed, and equal computations merged; codes stay codes."""
    import onnx_ir as ir
    from onnxscript import optimizer

    optimizer.fold_constants_ir(
        model, onnx_shape_inference=True, should_fold=lambda node: False if node.op_type == "DequantizeLinear" else None
    )
    ir.passes.common.RemoveUnusedNodesPass()(model)
    ir.passes.common.CommonSubexpressionEliminationPass()(model)


def _set_types(model: Any, gm: fx.GraphModule) -> None:
    """Codes of at most 4 bits become INT4, or UINT4 with codes and zero point raised by 8 where there is a zero point."""
    import onnx_ir as ir

    for tensor in manifest.quantized_tensors(gm).values():
        if tensor.codes is None or numerics.parse_format(tensor.format).bits > 4:
            continue
        raised = tensor.zero_point is not None
        kind = ir.DataType.UINT4 if raised else ir.DataType.INT4
        for name in (f"{tensor.path}.weight", f"{tensor.path}.weight_zero_point"):
            value = model.graph.initializers.get(name)
            if value is not None:
                codes = value.const_value.numpy()
                codes = (codes + 8).astype("uint8") if raised else codes
                value.const_value = ir.tensor(codes.astype(kind.numpy()), dtype=kind, name=name)
                value.dtype = kind


def _name_dimensions(model: Any, gm: fx.GraphModule) -> None:
    """Dynamic dimensions carry the names that capture declared."""
    import onnx_ir as ir

    names: dict[str, str] = {}
    for value, declared in zip(model.graph.inputs, source_of(gm).inputs, strict=True):
        for size, name in zip(value.shape, declared.shape, strict=True):
            if isinstance(name, str):
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
            sizes.append(text)
        value.shape = ir.Shape(sizes)
