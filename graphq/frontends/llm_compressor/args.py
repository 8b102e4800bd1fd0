"""``QuantizationArgs`` of compressed-tensors 0.19 as a ``Quant``, and back: every field, its defaults and its rules.

https://github.com/vllm-project/compressed-tensors, quantization/quant_args.py. Its numbers: symmetric integers have the
scale absmax / ((2^bits-1)/2), asymmetric ones round quotient and zero point together, mx exponents round to even;
weights by min-max are computed in the model's dtype.
"""

import re
from typing import Final, Literal

from graphq.errors import SpecError
from graphq.frontends.document import Plain, Section, nearest, show
from graphq.frontends.llm_compressor.observer import read_method, write_method
from graphq.spec.formats import Float, Format, Int, Mx, Nvfp4, has_source_arithmetic
from graphq.spec.quant import (
    Granularity,
    MinMax,
    PerBlock,
    PerChannel,
    PerGroup,
    PerHead,
    PerTensor,
    PerToken,
    Quant,
    RangeMethod,
)

Role = Literal["weights", "input_activations", "kv_cache_scheme"]
ARGS: Final = (
    *("num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder"),
    *("scale_dtype", "zp_dtype", "observer", "observer_kwargs"),
)
_STRATEGIES: Final = ("tensor", "channel", "group", "block", "token", "tensor_group", "attn_head")
_DTYPES: Final = ("uint8", "int8", "float8_e4m3fn", "float16", "bfloat16", "float32", "float64")
_MIN_MAX: Final = MinMax()
_NULLABLE: Final = ("group_size", "strategy", "block_structure", "scale_dtype", "zp_dtype", "observer", "actorder")


def filled(section: Section, nullable: tuple[str, ...] | None = None) -> Section:
    """The section without the keys whose value is null (``nullable``: of these), which are as good as not there."""
    values = {
        key: value
        for key, value in section.values.items()
        if value is not None or (nullable is not None and key not in nullable)
    }
    return Section(section.document, values, section.at)


def read_args(section: Section | None, role: Role, observer: str | None = None) -> Quant | None:
    """The format of one tensor; None where it is wrong, which is reported. ``observer`` stands above the section's."""
    if section is None:
        return None
    section.only(ARGS)
    given = filled(section, _NULLABLE)
    before = len(section.document.problems)
    strategy, granularity = _read_granularity(given, role)
    dynamic = _read_dynamic(given, strategy)
    if role == "weights" and dynamic:
        given.report("a weight's scales are known when it is compiled; write false", "dynamic")
    elif role != "weights" and strategy in ("channel", "block"):
        given.report(f"{strategy} is for weights; activations take tensor, token, group or tensor_group", "strategy")
    elif strategy in ("token", "group") and role != "weights" and not dynamic:
        given.report(f"scales of {strategy}s exist only at run time; write dynamic: true", "strategy")
    if role == "weights" and strategy == "token":
        given.report("token is for activations; weights take tensor, channel, group, block or tensor_group", "strategy")
    format = _read_format(given, strategy, granularity)
    if strategy == "tensor_group" and role != "weights" and dynamic is False:
        given.report("an activation's groups have their scales at run time; write local", "dynamic")
    method = read_method(given, role, dynamic is True, observer)
    if len(section.document.problems) > before:
        return None
    assert format is not None
    assert granularity is not None
    chosen = method or MinMax()
    if role == "weights":
        return given.made(lambda: weight_quant(format, granularity, chosen))
    return given.made(lambda: Quant(format, granularity, dynamic is True, chosen))


def weight_quant(format: Format, granularity: Granularity, method: RangeMethod = _MIN_MAX) -> Quant:
    """How a weight of this format is quantized: by min-max in the model's dtype."""
    is_own = method == MinMax() and has_source_arithmetic(format)
    return Quant(format, granularity, method=method, arithmetic="source" if is_own else "float32")


def read_actorder(section: Section | None) -> str | None:
    """``static`` where the columns of large activations come first, as GPTQ rounds them; None where it is not said."""
    value = None if section is None else section.values.get("actorder")
    if section is None or value is None or value is False:
        return None
    return order_word(section, "actorder", value)


def order_word(section: Section, key: str, value: Plain) -> str | None:
    """``static`` for what llm-compressor calls weight or static. Others are reported."""
    if isinstance(value, str) and value.lower() in ("weight", "static"):
        return "static"
    if value is True or (isinstance(value, str) and value.lower() in ("group", "dynamic")):
        section.report(
            f"{show(value)} stores groups in another order, which compressed-tensors has given up; write static", key
        )
    else:
        section.report(f"{show(value)} is not static, weight or null", key)
    return None


def _read_granularity(given: Section, role: Role) -> tuple[str, Granularity | None]:
    """The strategy, as given or as ``group_size`` implies, and the granularity."""
    size, word = given.integer("group_size"), given.text("strategy")
    strategy = word.lower() if word is not None else "tensor" if size is None else "channel" if size == -1 else "group"
    if strategy not in _STRATEGIES:
        given.report(f"{show(word)} is not a strategy{nearest(strategy, _STRATEGIES)}", "strategy")
        return "", None
    if strategy == "attn_head" and role != "kv_cache_scheme":
        given.report("attn_head is for what attention reads; see kv_cache_scheme", "strategy")
    if size is not None and (size < -1 or size == 0):
        given.report(f"{size} is neither positive, for groups, nor -1, for channels", "group_size")
        return strategy, None
    grouped = strategy in ("group", "tensor_group")
    if size is not None and size > 0 and not grouped:
        given.report(f"the strategy is {strategy}; groups have the strategy group", "group_size")
    if grouped and (size is None or size < 0):
        given.report(f"the strategy {strategy} needs a positive one", "group_size")
        return strategy, None
    block = _read_block(given)
    if (strategy == "block") != ("block_structure" in given.values):
        given.report("belongs to the strategy block, and it to this", "block_structure")
    match strategy:
        case "tensor":
            return strategy, PerTensor()
        case "channel":
            return strategy, PerChannel()
        case "token":
            return strategy, PerToken()
        case "block":
            return strategy, block
        case "attn_head":
            return strategy, PerHead()
        case _:
            assert size is not None
            return strategy, given.made(lambda: PerGroup(size), "group_size")


def _read_block(given: Section) -> PerBlock | None:
    value = given.values.get("block_structure")
    if "block_structure" not in given.values:
        return None
    if isinstance(value, str) and (found := re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", value)):
        value = [int(found[1]), int(found[2])]
    match value:
        case [int() as rows, int() as columns]:
            return given.made(lambda: PerBlock(rows, columns), "block_structure")
        case _:
            given.report(f"{show(value)} is not [rows, columns], such as [128, 128]", "block_structure")
            return None


def _read_dynamic(given: Section, strategy: str) -> bool | Literal["local"]:
    value = given.values.get("dynamic", False)
    if isinstance(value, str) and value.lower() == "local":
        if strategy not in ("tensor_group", ""):
            given.report(f"local belongs to the strategy tensor_group, not to {strategy}", "dynamic")
        return "local"
    if not isinstance(value, bool):
        given.report(f"{show(value)} is not true, false or local", "dynamic")
        return False
    return value


def _read_format(given: Section, strategy: str, granularity: Granularity | None) -> Format | None:
    bits = given.integer("num_bits") if "num_bits" in given.values else 8
    word = given.text("type") if "type" in given.values else "int"
    symmetric = given.boolean("symmetric") if "symmetric" in given.values else True
    scale, zero_point = _dtype(given, "scale_dtype"), _dtype(given, "zp_dtype")
    if bits is None or word is None or symmetric is None:
        return None
    if not symmetric and word.lower() == "int" and zero_point not in (None, "int8", "int16"):
        given.report(f"zero points of integers are int8, not {zero_point}", "zp_dtype")
    match word.lower():
        case "int":
            if scale not in (None, "float32"):
                given.report(f"scales of integers stay float32; {scale} is not supported", "scale_dtype")
            if strategy == "tensor_group":
                given.report("tensor_group is for 4-bit floats in groups of 16", "strategy")
            divisor = "half" if symmetric else "max"
            return given.made(lambda: Int(bits, symmetric, divisor, joint=not symmetric), "num_bits")
        case "float":
            if not symmetric:
                given.report("float formats are symmetric", "symmetric")
            return _float(given, bits, strategy, granularity, scale)
        case _:
            given.report(f"{show(word)} is not int or float", "type")
            return None


def _float(
    given: Section, bits: int, strategy: str, granularity: Granularity | None, scale: str | None
) -> Format | None:
    if bits not in (4, 8):
        given.report(f"float formats have 4 or 8 bits, not {bits}", "num_bits")
        return None
    if strategy == "tensor_group":
        if bits != 4 or granularity not in (None, PerGroup(16)):
            given.report("tensor_group is for 4-bit floats in groups of 16", "strategy")
        if scale not in (None, "float8_e4m3fn"):
            given.report(f"scales under a scale of the tensor are float8_e4m3fn, not {scale}", "scale_dtype")
        return Nvfp4()
    if scale == "uint8":
        if granularity not in (None, PerGroup(32)):
            given.report("uint8, a scale that is an exponent, is for groups of 32", "scale_dtype")
        return Mx("float4_e2m1" if bits == 4 else "float8_e4m3fn", "even")
    if scale not in (None, "float32"):
        given.report(f"{scale} is not supported here; leave it out", "scale_dtype")
    return Float("float4_e2m1" if bits == 4 else "float8_e4m3fn")


def _dtype(given: Section, key: str) -> str | None:
    word = given.text(key)
    if word is None:
        return None
    name = word.removeprefix("torch.")
    if name not in _DTYPES and name != "int16":
        given.report(f"{show(word)} is not a dtype{nearest(name, _DTYPES)}", key)
        return None
    return name


def write_args(quant: Quant, role: Role) -> dict[str, Plain]:
    """The arguments that ``read_args`` reads as this. Raises ``SpecError`` for what they cannot say."""
    items = _write_format(quant)
    own = weight_quant(quant.format, quant.granularity, quant.method) if role == "weights" else quant
    if quant.arithmetic != own.arithmetic:
        raise SpecError(f"{quant}: llm-compressor computes such weights in the model's dtype; write {own}")
    match quant.granularity:
        case PerGroup(size):
            items |= {"strategy": "tensor_group" if isinstance(quant.format, Nvfp4) else "group", "group_size": size}
        case PerBlock(rows, columns):
            items |= {"strategy": "block", "block_structure": [rows, columns]}
        case PerChannel():
            items["strategy"] = "channel"
        case PerToken():
            items["strategy"] = "token"
        case PerHead():
            items["strategy"] = "attn_head"
        case PerTensor():
            items["strategy"] = "tensor"
    is_local = isinstance(quant.format, Nvfp4) and role != "weights" and not quant.dynamic
    items["dynamic"] = "local" if is_local else quant.dynamic
    if isinstance(quant.format, Nvfp4):
        items["scale_dtype"] = "torch.float8_e4m3fn"
    elif isinstance(quant.format, Mx):
        items["scale_dtype"] = "torch.uint8"
    if not quant.dynamic:
        items |= write_method(quant, role)
    return items


def _write_format(quant: Quant) -> dict[str, Plain]:
    match quant.format:
        case Int(bits, True, "half") if bits <= 8:
            return {"num_bits": bits, "type": "int", "symmetric": True}
        case Int(bits, False, joint=True, signed=True, power_of_two=False) if bits <= 8:
            return {"num_bits": bits, "type": "int", "symmetric": False}
        case Float("float8_e4m3fn", "max") | Mx("float8_e4m3fn", "even"):
            return {"num_bits": 8, "type": "float", "symmetric": True}
        case Float("float4_e2m1", "max") | Mx("float4_e2m1", "even") | Nvfp4():
            return {"num_bits": 4, "type": "float", "symmetric": True}
        case Int(bits, symmetric, signed=True) if bits <= 8:
            own = Int(bits, symmetric, "half" if symmetric else "max", joint=not symmetric)
            raise SpecError(f"{quant}: compressed-tensors' {bits}-bit integers are {own}")
        case Mx("float8_e4m3fn" | "float4_e2m1" as element):
            raise SpecError(f"{quant}: compressed-tensors has {Mx(element, 'even')}")
        case other:
            raise SpecError(f"{quant}: compressed-tensors has no {other}")
