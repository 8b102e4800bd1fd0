"""A graph of packed modules as plain data and back: nodes over an allow-list of ops, no code.

Ops are those of ``allowed_ops``, graphq's own, and arithmetic on sizes. What an argument can be: a node, a number, a
word, None, a list, a dtype, a device, a layout or a memory format. Infinite numbers are written as words, since JSON
has none.
"""

import keyword
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, cast

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from graphq.errors import PassError, SpecError, TargetError
from graphq.runtime import ops as graphq_ops
from graphq.runtime.allowed_ops import OVERLOADS
from graphq.runtime.arguments import check_arguments
from graphq.runtime.checked_ops import SUBSTITUTES
from graphq.runtime.experts import PackedExperts
from graphq.runtime.fused_layers import FusedLayer
from graphq.runtime.linear import PackedLinear
from graphq.runtime.modules import Int8Linear, PackedWeight, settings_of
from graphq.runtime.packed_product import PackedProduct
from graphq.runtime.quantized_module import QuantizedModule
from graphq.state import put_input, put_tensor

_FUNCTIONS: Final[dict[str, Callable[..., Any]]] = {
    "getitem": operator.getitem,
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "truediv": operator.truediv,
    "mod": operator.mod,
    "pow": operator.pow,
    "neg": operator.neg,
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "sym_max": torch.sym_max,
    "sym_min": torch.sym_min,
    "sym_not": torch.sym_not,
    "sym_float": torch.sym_float,
    "sym_int": torch.sym_int,
    "sym_ite": torch.sym_ite,
}
_NAMES: Final = {function: name for name, function in _FUNCTIONS.items()}
_CHECKED: Final = {function: name for name, function in SUBSTITUTES.items() if not isinstance(function, OpOverload)}
_GRAPHQ: Final = {
    str(op): op
    for op in (
        graphq_ops.quantize,
        graphq_ops.dequantize,
        graphq_ops.choose_scale,
        graphq_ops.choose_global_scale,
        graphq_ops.quantize_dynamic,
        graphq_ops.recurrence,
        graphq_ops.max_pool2d,
    )
}
_GRAPHQ_MOE: Final = {str(op): op for op in (graphq_ops.grouped_linear, graphq_ops.select_rows)}
_MODULES: Final = {
    "PackedWeight": PackedWeight,
    "PackedLinear": PackedLinear,
    "PackedExperts": PackedExperts,
    "Int8Linear": Int8Linear,
    "FusedLayer": FusedLayer,
}
_DTYPES: Final = re.compile(r"b?float(64|32|16)|float8_e\w+|u?int(64|32|16|8)|bool|complex(128|64)")
_INT64: Final = 1 << 63
_DAMAGE: Final = (
    KeyError,
    TypeError,
    ValueError,
    AttributeError,
    IndexError,
    RuntimeError,
    ArithmeticError,
    AssertionError,
    MemoryError,
    SyntaxError,
    PassError,
    SpecError,
)


def allowed(target: object) -> bool:
    """Whether an op may stand in an artifact: it changes nothing in place, reads no file, calls no code, and checks its
    arguments.
    """
    if target in _NAMES or str(target) in _GRAPHQ | _GRAPHQ_MOE:
        return True
    if not isinstance(target, OpOverload) or target.namespace != "aten":
        return False
    _, op, overload = str(target).split(".")
    return overload in OVERLOADS.get(op, "").split()


def refusal(node: fx.Node) -> str | None:
    """Why an artifact cannot hold a node of a graph, None if it can."""
    if node.op != "call_function":
        return None
    if not allowed(node.target):
        return f"{node.target} cannot be stored: graphq.runtime.allowed_ops does not list it"
    try:
        check_arguments(node.name, cast(Any, node.target), node.args, node.kwargs)
        argument_to_json([node.args, *node.kwargs.values()])
    except TargetError as error:
        return f"{node.target} cannot be stored: {str(error).removeprefix('graph.json: ')}"
    return None


def _target_name(target: object) -> str:
    return _NAMES[cast(Any, target)] if target in _NAMES else _CHECKED.get(cast(Any, target), str(target))


def _target_named(node: str, name: str) -> Callable[..., Any]:
    known = _FUNCTIONS.get(name) or (_GRAPHQ | _GRAPHQ_MOE).get(name)
    if known is not None:
        return known
    parts = name.split(".")
    if len(parts) == 3 and parts[0] == "aten" and parts[2] in OVERLOADS.get(parts[1], "").split():
        return getattr(getattr(torch.ops.aten, parts[1]), parts[2])
    raise TargetError(f"graph.json: {node}: {name} is not an op that artifacts may hold")


def graph_to_json(gm: fx.GraphModule) -> dict[str, Any]:
    """The graph and the settings of its modules. There must be no ``refusal`` of a node."""
    modules: dict[str, Any] = {}
    nodes: list[dict[str, Any]] = []
    for node in gm.graph.nodes:
        entry: dict[str, Any] = {"name": node.name, "op": node.op}
        if node.op == "call_function":
            entry["target"] = _target_name(node.target)
        elif node.op != "output":
            entry["target"] = str(node.target)
        if node.args:
            entry["args"] = [argument_to_json(a) for a in node.args]
        if node.kwargs:
            entry["kwargs"] = {k: argument_to_json(v) for k, v in node.kwargs.items()}
        if node.op == "call_module":
            module = gm.get_submodule(str(node.target))
            assert isinstance(module, QuantizedModule)
            settings = {k: argument_to_json(v) for k, v in settings_of(module).items()}
            modules[str(node.target)] = {"class": type(module).__name__, "settings": settings}
        nodes.append(entry)
    return {"nodes": nodes, "modules": modules}


def argument_to_json(value: Any) -> Any:
    """An argument of a node as plain data, other nodes by their names. Raises ``TargetError`` for what has no form."""
    match value:
        case fx.Node():
            return {"node": value.name}
        case torch.dtype():
            return {"dtype": str(value).removeprefix("torch.")}
        case torch.device():
            return {"device": "cpu"}
        case torch.layout() | torch.memory_format():
            return {"torch": str(value).removeprefix("torch.")}
        case float() if not math.isfinite(value):
            return {"float": str(value)}
        case list() | tuple():
            return [argument_to_json(v) for v in cast(list[Any], value)]
        case slice():
            return {"slice": [argument_to_json(v) for v in (value.start, value.stop, value.step)]}
        case None | bool() | int() | float() | str():
            return value
        case _:
            raise TargetError(f"graph.json: cannot hold an argument of type {type(value).__name__}")


def graph_from_json(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    """The graph that ``graph_to_json`` wrote, with these tensors. Raises ``TargetError`` for anything else."""
    try:
        return _build(data, tensors)
    except _DAMAGE as error:
        raise TargetError(f"graph.json: damaged: {type(error).__name__}: {error}") from error


def _build(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    root = nn.Module()
    for path in (*data["modules"], *tensors):
        _check_path(path)
    for path, described in data["modules"].items():
        if described["class"] not in _MODULES:
            raise TargetError(f"graph.json: {described['class']} is not a class of modules that artifacts may hold")
        settings = {k: argument_from_json(v, {}) for k, v in described["settings"].items()}
        dtype = settings.get("dtype", torch.float32)  # without one, the module refuses by itself
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize == 1:
            raise TargetError(f"graph.json: {path}: dtype: {dtype} is not one that graphs compute in")
        with torch.device("meta"):  # the tensors are at hand; whatever sizes the settings ask for, none is made
            made = _MODULES[described["class"]](**settings)
        _check_settings(path, made)
        for name, wanted in made.named_buffers(prefix=path):
            if name not in tensors:
                raise TargetError(f"graph.json: the weights lack {name}")
            if (tensors[name].dtype, tensors[name].shape) != (wanted.dtype, wanted.shape):
                raise TargetError(
                    f"graph.json: {name} is {_describe(wanted)}, the weights hold {_describe(tensors[name])}"
                )
        _add_module(root, path, made)
    for name, tensor in tensors.items():
        put_tensor(root, name, tensor)
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for entry in data["nodes"]:
        op, name = entry["op"], entry["name"]
        args = tuple(argument_from_json(a, nodes) for a in entry.get("args", ()))
        kwargs = {_name(k): argument_from_json(v, nodes) for k, v in entry.get("kwargs", {}).items()}
        match op:
            case "placeholder":
                node = put_input(graph, _name(entry["target"]))
            case "get_attr":
                if entry["target"] not in tensors:
                    raise TargetError(f"graph.json: the weights lack {entry['target']}")
                node = graph.create_node("get_attr", entry["target"], name=name)
            case "call_module":
                if entry["target"] not in data["modules"]:
                    raise TargetError(f"graph.json: {entry['target']} is not one of its modules")
                if kwargs or not _fits(args, root.get_submodule(entry["target"])):
                    raise TargetError(f"graph.json: {name}: its arguments are not those of {entry['target']}")
                node = graph.create_node("call_module", entry["target"], args, kwargs, name=name)
            case "call_function":
                target = _target_named(name, entry["target"])
                check_arguments(name, target, args, kwargs)
                if entry["target"] == "aten.empty.memory_format":
                    kwargs.pop("memory_format", None)  # the zeros in its place have none
                target = SUBSTITUTES.get(entry["target"], target)
                node = graph.create_node("call_function", target, args, kwargs, name=name)
            case "output":
                if not isinstance(args[0], list) or not all(isinstance(a, fx.Node) for a in cast(list[Any], args[0])):
                    raise TargetError("graph.json: the output is not a list of nodes")
                node = graph.output(args[0])
            case _:
                raise TargetError(f"graph.json: no node can be a {op}")
        nodes[name] = node
    if [entry["op"] for entry in data["nodes"]].count("output") != 1 or data["nodes"][-1]["op"] != "output":
        raise TargetError("graph.json: its last node, and no other, must be the output")
    graph.lint()
    return fx.GraphModule(root, graph)


def _describe(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"


def _fits(args: tuple[Any, ...], module: nn.Module) -> bool:
    """Whether a packed module is called with these: nothing, an input, or codes, their scales and zero points; and
    behind the first of them experts' offsets.
    """
    if isinstance(module, FusedLayer):
        return len(args) == 9
    takes_codes = isinstance(module, Int8Linear) or (isinstance(module, PackedProduct) and module.takes_codes)
    wanted = (3 if takes_codes else int(isinstance(module, PackedProduct))) + isinstance(module, PackedExperts)
    if takes_codes and len(args) == wanted and args[-1] is None:
        args, wanted = args[:-1], wanted - 1
    return len(args) == wanted and all(isinstance(a, fx.Node) for a in args)


def _check_settings(path: str, module: QuantizedModule) -> None:
    """Raises ``TargetError`` for settings that fit no weight, whatever tensors there are; a fused layer does itself."""
    settings = settings_of(module)
    shape = settings["shape"]
    if isinstance(module, Int8Linear):
        if len(shape) != 2:
            raise TargetError(f"graph.json: {path}: shape: {shape} is not that of a linear")
        return
    if not isinstance(module, PackedWeight):
        return
    row_axes, block = settings["row_axes"], settings["block"]
    if len(set(row_axes)) != len(row_axes) or not set(row_axes) <= set(range(len(shape))):
        raise TargetError(f"graph.json: {path}: row_axes: {row_axes} are not axes of {shape}")
    if isinstance(module, PackedLinear) and (len(shape) != 2 or len(row_axes) != 1):
        raise TargetError(f"graph.json: {path}: shape: {shape} is not that of a linear")
    if isinstance(module, PackedExperts) and (len(shape) != 3 or not shape[0] or list(row_axes) != [0, 1]):
        raise TargetError(f"graph.json: {path}: shape: {shape} is not that of experts")
    if len(block) != len(shape) or not all(b == -1 or b > 0 for b in block):
        raise TargetError(f"graph.json: {path}: block: {block} does not divide {shape}")


def _name(text: object) -> str:
    """``text``, if it can be a name in the Python code that ``torch.fx`` writes for a graph, and nothing more."""
    if not isinstance(text, str) or not text.isidentifier() or keyword.iskeyword(text):
        raise TargetError(f"graph.json: {text!r} is not a name")
    return text


def _check_path(path: str) -> None:
    """Raises ``TargetError`` for a path that would end the quotes which that code puts around its segments."""
    if not path.isprintable() or '"' in path or "\\" in path:
        raise TargetError(f"graph.json: {path!r} is not a path of tensors or modules")


def _add_module(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    for segment in parent.split(".") if parent else ():
        children = dict(root.named_children())
        if segment not in children:
            root.add_module(segment, nn.Module())
        root = root.get_submodule(segment)
    for child, inner in dict(root.named_children()).get(name, nn.Module()).named_children():
        module.add_module(child, inner)
    root.add_module(name, module)


def argument_from_json(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    """The argument that ``argument_to_json`` wrote. Raises ``TargetError``, or ``KeyError`` for an unknown node."""
    match value:
        case {"node": str(name)}:
            return nodes[name]
        case {"dtype": str(name)}:
            return _torch_named(name, torch.dtype)
        case {"device": "cpu"}:
            return torch.device("cpu")
        case {"torch": "strided"}:
            return torch.strided
        case {"torch": str(name)}:
            return _torch_named(name, torch.memory_format)
        case {"float": "inf" | "-inf" | "nan" as text}:
            return float(text)
        case {"slice": [start, stop, step]}:
            return slice(*(argument_from_json(v, nodes) for v in (start, stop, step)))
        case list():
            return [argument_from_json(v, nodes) for v in cast(list[Any], value)]
        case int() if not -_INT64 <= value < _INT64:
            raise TargetError(f"graph.json: an integer of {value.bit_length()} bits is not an argument")
        case None | bool() | int() | float() | str():
            return value
        case _:
            raise TargetError(f"graph.json: {value!r} is not an argument")


def _torch_named(name: str, kind: type) -> Any:
    found = getattr(torch, name, None)
    if not isinstance(found, kind) or (kind is torch.dtype and not _DTYPES.fullmatch(name)):
        raise TargetError(f"graph.json: {name} is not a {kind.__name__} that artifacts may hold")
    return found
