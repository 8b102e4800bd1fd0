"""A captured graph held to its source: both run on the same inputs, at two sets of sizes, and must give the same.

Export follows the path that a model takes while it is traced, and code may take another one there: masks that are left
out of eager calls, shortcuts that look at values. Such a graph is wrong without any other sign of it.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, cast, final

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from graphq.capture.export import FlatModel, evaluating
from graphq.capture.source import BATCH, PAST, SEQUENCE, TOTAL, Source, TensorInput, source_of, with_total
from graphq.errors import GraphError, PassError

_LOOSEST: Final = 0.1  # of the largest value: what rounding may come to in 16 bits, through many layers
_ROUNDINGS: Final = 2000  # how many roundings of the dtype may add up
_TIGHTEST: Final = 1e-5
_FEW: Final = 0.01  # the share of integers that may differ, such as places of equal values
_SIZES: Final = ({BATCH: 2, SEQUENCE: 3, PAST: 5}, {BATCH: 1, SEQUENCE: 6, PAST: 0})


def prove(gm: fx.GraphModule, flat: FlatModel, samples: Sequence[Sequence[Tensor]]) -> tuple[str, ...]:
    """Notes on what could not be compared; none where the graph gives what its source gives, for each of ``samples``.

    Raises ``GraphError`` with the first module whose outputs differ, ``PassError`` where only the graph fails. Nothing
    is compared without weights.
    """
    held = (*gm.state_dict(keep_vars=True).values(), *(x for given in samples for x in given))
    if any(isinstance(x, FakeTensor) or x.is_meta for x in held):
        return ()
    with torch.no_grad(), evaluating(flat), torch.random.fork_rng(devices=[]):
        for given in samples:
            try:
                wanted = flat(*(x.clone() for x in given))
            except Exception as error:  # noqa: BLE001 - whatever its code raises, at sizes that it does not take
                return (f"capture: not compared with the model at {_sizes(gm, given)}: it fails: {first_line(error)}",)
            try:
                found = gm.forward(*given)
            except Exception as error:
                name = type(flat.model).__name__
                raise PassError(f"capture: the graph of {name} fails where it does not: {first_line(error)}") from error
            problem = _difference(gm, wanted, found)
            if not problem:
                continue
            if _difference(gm, wanted, flat(*(x.clone() for x in given))):
                return ("capture: not compared with the model, which gives another result each time",)
            where = f"{_sizes(gm, given)}; {_first_module(gm, flat, given)}"
            raise GraphError(
                f"{type(flat.model).__name__}: the captured graph does not compute what the model does: {problem} at"
                f" {where}; code that asks whether it is traced, or looks at values, has no one graph"
            )
    return ()


def first_line(error: Exception) -> str:
    """What the error says first; its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _sizes(gm: fx.GraphModule, given: Sequence[Tensor]) -> str:
    source = source_of(gm)
    found = {
        str(d): size
        for declared, x in zip(source.inputs, given, strict=True)
        for d, size in zip(declared.shape, x.shape, strict=True)
        if isinstance(d, str) and d != TOTAL
    }
    return ", ".join(f"{name} {size}" for name, size in found.items()) or "the sizes of the examples"


def _difference(gm: fx.GraphModule, wanted: Sequence[Tensor], found: Sequence[Tensor]) -> str:
    """The first output that differs, and by how much; nothing where all are alike.

    Integers and booleans count where a model gives nothing else: beside numbers they are places of largest values and
    the like, which the last bit of two equal numbers moves.
    """
    tolerance = _tolerance(wanted)
    pairs = list(zip(source_of(gm).outputs, wanted, _listed(found), strict=True))
    numbers = [pair for pair in pairs if pair[1].is_floating_point() or pair[1].is_complex()]
    for name, a, b in numbers or pairs:
        if (share := largest_share(a, b)) > tolerance:
            return f"{name} differs by {share:.2g} of its largest value"
    return ""


def _listed(found: Any) -> Sequence[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def _tolerance(outputs: Sequence[Tensor]) -> float:
    """The loosest that any of the outputs' dtypes asks for: what they are made of may be as coarse."""
    eps = max((torch.finfo(x.dtype).eps for x in outputs if x.is_floating_point()), default=0.0)
    return min(_LOOSEST, max(_TIGHTEST, _ROUNDINGS * eps))


def largest_share(wanted: Tensor, found: Tensor) -> float:
    """The largest difference as a share of the largest value; 1 where shapes or what is infinite differ."""
    if wanted.shape != found.shape or wanted.dtype != found.dtype:
        return 1.0
    if wanted.numel() == 0:
        return 0.0
    if not (wanted.is_floating_point() or wanted.is_complex()):
        return float((wanted != found).double().mean() > _FEW)
    kind = torch.complex128 if wanted.is_complex() else torch.float64
    a, b = wanted.to(kind), found.to(kind)
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()):
        return 1.0
    a, b = a[finite], b[finite]
    largest = float(a.abs().max()) if a.numel() else 0.0
    return float((a - b).abs().max()) / largest if largest else float(bool(b.numel() and b.abs().max() > _TIGHTEST))


@final
class _Recorder(fx.Interpreter):
    """Runs a graph and keeps what each of its nodes gives, by the path of each module that the node is in."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.values: dict[str, list[Tensor]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        for path, _ in (n.meta.get("nn_module_stack") or {}).values():
            if isinstance(result, Tensor):
                self.values.setdefault(re.sub(r"@\d+", "", str(path)), []).append(result)
        return result


def _first_module(gm: fx.GraphModule, flat: FlatModel, given: Sequence[Tensor]) -> str:
    """The first module of the source none of whose nodes gives what the module gives, in words."""
    recorder = _Recorder(gm)
    recorder.run(*given)
    returned: list[tuple[str, nn.Module, Tensor]] = []
    hooks = [
        module.register_forward_hook(_keep(returned, name), with_kwargs=True)
        for name, module in flat.model.named_modules()
        if name
    ]
    try:
        flat(*(x.clone() for x in given))
    finally:
        for hook in hooks:
            hook.remove()
    for name, module, output in returned:
        inside = [x for x in recorder.values.get(name, []) if x.shape == output.shape]
        if inside and all(largest_share(output, x) > _tolerance([output]) for x in inside):
            return f"the first module whose outputs differ is {name} ({type(module).__name__})"
    return "it differs outside of all modules"


def _keep(returned: list[tuple[str, nn.Module, Tensor]], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        first = next(_floats(output), None)
        if first is not None:
            returned.append((name, module, first.clone()))

    return hook


def _floats(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors of a module's output, in order."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in cast(Mapping[Any, Any], value).values():
            yield from _floats(item)
    elif isinstance(value, list | tuple):
        for item in cast(Sequence[Any], value):
            yield from _floats(item)


def resized(source: Source, examples: Sequence[Tensor]) -> list[Tensor] | None:
    """The examples at other sizes of their named dimensions, one less or two instead of one; None where there is none.

    What a smaller one leaves out is the end, so that ids and features stay what a model takes.
    """
    sizes = {
        d: size
        for declared, x in zip(source.inputs, examples, strict=True)
        for d, size in zip(declared.shape, x.shape, strict=True)
        if isinstance(d, str)
    }
    wanted: dict[str, int] = {}
    for name, size in sizes.items():
        low, high = source.bounds.get(name, (size, size))
        wanted[name] = size - 1 if max(low, 1) < size else min(2, high) if size == 1 else size
    if wanted == sizes:
        return None
    return [_resized(declared, x, wanted) for declared, x in zip(source.inputs, examples, strict=True)]


def _resized(declared: TensorInput, x: Tensor, wanted: Mapping[str, int]) -> Tensor:
    for axis, d in enumerate(declared.shape):
        if isinstance(d, str) and x.shape[axis] != wanted[d]:
            size = wanted[d]
            x = x.narrow(axis, 0, size) if size < x.shape[axis] else torch.cat([x] * size, axis)
    return x.contiguous()


def samples_of(model: nn.Module, source: Source) -> list[list[Tensor]]:
    """Inputs of a transformers model, drawn, at two sets of sizes within its ranges; caches are empty in the second.

    The second is longer than a sliding window of a few tokens.
    """
    config: Any = getattr(model, "config", None)
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
    window = getattr(text, "sliding_window", None)
    found: list[list[Tensor]] = []
    generator = torch.Generator().manual_seed(0)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for sizes in _SIZES:
        longer = window + 3 if sizes[PAST] == 0 and isinstance(window, int) and 0 < window < 64 else 0
        chosen = {
            name: min(max(low, longer if name == SEQUENCE and longer else sizes.get(name, low)), high)
            for name, low, high in source.ranges
        }
        total = with_total(chosen)
        found.append([_drawn(text, one, total, generator).to(device) for one in source.inputs])
    return found


def _drawn(config: Any, wanted: TensorInput, sizes: Mapping[str, int], generator: torch.Generator) -> Tensor:
    shape = [sizes[d] if isinstance(d, str) else d for d in wanted.shape]
    if wanted.dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(wanted.dtype)
    if wanted.name == "input_ids":
        return drawn_ids(config, shape, generator)
    if wanted.name == "position_ids":
        past = sizes.get(PAST, 0)
        return torch.arange(past, past + shape[-1]).expand(shape).contiguous()
    if wanted.name == "token_type_ids":
        return torch.zeros(shape, dtype=wanted.dtype)
    return torch.ones(shape, dtype=wanted.dtype)


def drawn_ids(config: Any, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Tokens without those that the configuration gives a meaning: padding, and places of images and sounds."""
    vocabulary = getattr(config, "vocab_size", None) or 2
    special = {v for k, v in vars(config).items() if k.endswith(("token_id", "token_index")) and isinstance(v, int)}
    plain = torch.tensor([i for i in range(min(vocabulary, 1000)) if i not in special] or [0])
    return plain[torch.randint(0, len(plain), tuple(shape), generator=generator)]
