"""What graphq makes of each family of transformers: captured, equal at lengths, quantized, generating; and as a document.

``python -m tests.families NAME ...`` measures families (all without a name) and keeps what it finds in
``tests/golden/families.json``; ``python -m tests.families --print`` prints ``docs/families.md`` from that.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor, fx

from graphq import compiler
from graphq.capture.source import BATCH, SEQUENCE, Source, source_of, with_total
from graphq.errors import GraphqError
from graphq.frontends import load_spec
from graphq.ir.edit import copy_graph
from graphq.ir.layers import layers
from graphq.ir.pipeline import Pipeline
from graphq.passes.annotate import decide
from graphq.pipelines import canonical_passes, passes_for
from graphq.runtime.model import CompiledModel
from graphq.runtime.stepping import read_text
from graphq.spec.plan import Plan
from tests.family_models import FAMILIES, IMAGE, Family, text

GOLDEN: Final = Path(__file__).with_name("golden") / "families.json"
KINDS: Final = {
    "language": "Language models",
    "recurrent": "Recurrent and hybrid language models",
    "encoder": "Encoders of text",
    "encoder-decoder": "Encoder-decoders",
    "vision": "Vision models",
    "audio": "Audio encoders",
    "vision-language": "Vision-language models",
}
SIZES: Final = ({BATCH: 2, SEQUENCE: 3}, {BATCH: 1, SEQUENCE: 5}, {BATCH: 3, SEQUENCE: 11}, {BATCH: 1, SEQUENCE: 19})
NEW_TOKENS: Final = 8
_CONVOLUTIONS: Final = ("convbert", "convnext", "resnet", "regnet", "mobilenet-v2", "swin", "segformer", "yolos")
EQUAL: Final = 1e-5  # of the largest logit, float32


@final
@dataclasses.dataclass(frozen=True)
class Row:
    """What came of a family.

    ``captured``: ``dynamic``, ``token by token``, the dimensions that are fixed, or the error. ``layers`` and ``quantized``: of the spec's
    scope. ``equal``: at how many of the four sizes the graph gives what the model does. ``error``: of W8A8's output, as
    a share of the float output's norm. ``generates``: whether greedy tokens are those of the model; None where it
    generates nothing.
    """

    captured: str
    layers: int = 0
    quantized: int = 0
    equal: int = 0
    sizes: int = 0
    error: float | None = None
    generates: bool | None = None

    @property
    def is_captured(self) -> bool:
        """Whether there is a graph."""
        return self.captured in ("dynamic", "token by token") or self.captured.startswith("fixed: ")


def measure(family: Family) -> Row:
    """What comes of a family today."""
    model = family.build()
    inputs = None if family.inputs is None else family.inputs()
    try:
        captured, gm = _captured(model, inputs, cache=family.kind != "vision-language" or inputs is None)
    except GraphqError as error:
        return Row(plain(str(error)))
    source = source_of(gm)
    at = samples(source, inputs)
    equal = sum(_equal(gm, model, batch) for batch in at)
    quantized = copy_graph(gm)
    plans = _quantize(quantized, [] if source.has_states else at, inputs is not None or family.name in _CONVOLUTIONS)
    with torch.no_grad():
        wanted, found = (_first(_run(one, at[0])) for one in (gm, quantized))
    error = float((wanted - found).norm() / wanted.norm()) if wanted.any() else None
    generates = _generates(gm, model) if source.is_causal_lm else None
    return Row(captured, len(layers(gm)), plans, equal, len(at), error and float(f"{error:.1e}"), generates)


def _captured(model: Any, inputs: Mapping[str, Tensor] | None, cache: bool) -> tuple[str, fx.GraphModule]:
    """The graph, with the words for what of its inputs is fixed."""
    try:
        gm = compiler.capture(model, inputs=inputs, cache=cache)
    except GraphqError as error:
        declared = dict(re.findall(r'shapes=\{"(\w+)": (\d+)\}', str(error)))
        if not declared:
            raise
        sizes = {name: int(size) for name, size in declared.items()}
        gm = compiler.capture(model, inputs=inputs, cache=cache, shapes=sizes)
    source = source_of(gm)
    fixed = [f"{name} {size}" for name, size in source.fixed.items() if name in (BATCH, SEQUENCE)]
    if source.has_states and source.fixed.get(SEQUENCE) == 1:
        return "token by token", gm
    notes = [note for note in source.notes if "is fixed" in note]
    if notes and not fixed:
        fixed = [SEQUENCE]
    return (f"fixed: {', '.join(fixed)}" if fixed else "dynamic"), gm


def samples(source: Source, inputs: Mapping[str, Tensor] | None) -> list[list[Tensor]]:
    """The graph's inputs at four sizes, as far as its dimensions allow; caches are empty."""
    found: list[list[Tensor]] = []
    seen: list[dict[str, int]] = []
    ranges = [one for one in source.ranges if one[0] != SEQUENCE or not source.has_states]
    for wanted in SIZES:
        size = {name: min(max(wanted.get(name, 0), low), high) for name, low, high in ranges}
        size |= {SEQUENCE: wanted[SEQUENCE]} if source.has_states else {}
        if inputs is not None:
            given = [inputs[one.name] for one in source.inputs]
            shapes = [(one.shape, x.shape) for one, x in zip(source.inputs, given, strict=True)]
            held = {d: n for declared, shape in shapes for d, n in zip(declared, shape, strict=True)}
            size = {name: min(n, held[name]) for name, n in size.items()}
            if "input_ids" in inputs and (inputs["input_ids"] == IMAGE).any():
                size |= {name: held[name] for name in size if name == SEQUENCE}  # no place of an image is cut off
        if size in seen:
            continue
        seen.append(size)
        total = with_total(dict(size))
        found.append([_input(one.name, one.dtype, [total.get(str(d), d) for d in one.shape], inputs, total)
                      for one in source.inputs])  # fmt: skip
    return found


def _input(
    name: str, dtype: torch.dtype, shape: Sequence[Any], inputs: Mapping[str, Tensor] | None, sizes: Mapping[str, int]
) -> Tensor:
    if inputs is not None:
        return inputs[name][tuple(slice(0, n) for n in shape)].contiguous()
    if name == "position_ids":
        return torch.arange(shape[-1]).expand(*shape).contiguous()
    if dtype.is_floating_point:
        if name.startswith("past_key_values."):
            return torch.zeros(*shape, dtype=dtype)
        return torch.randn(*shape, generator=torch.Generator().manual_seed(3))
    if name == "input_ids":
        return text(*shape)
    return torch.zeros(*shape, dtype=dtype) if name == "token_type_ids" else torch.ones(*shape, dtype=dtype)


def _equal(gm: fx.GraphModule, model: Any, batch: Sequence[Tensor]) -> bool:
    """Whether the graph's first output is the model's."""
    source = source_of(gm)
    given = {one.name: x for one, x in zip(source.inputs, batch, strict=True) if one.name not in source.pasts}
    with torch.no_grad():
        found = _first(_run(gm, batch))
        wanted = _first(tuple(model(**given, return_dict=True).values()))
    return wanted.shape == found.shape and bool((wanted - found).abs().max() <= EQUAL * wanted.abs().max())


def _run(gm: fx.GraphModule, batch: Sequence[Tensor]) -> Sequence[Tensor]:
    """The graph's outputs; of one with states, for a text of any length."""
    source = source_of(gm)
    if not source.has_states:
        return gm(*batch)
    return list(read_text(source, lambda one: gm(*one), dict(zip(source.names, batch, strict=True))).values())


def _first(outputs: Any) -> Tensor:
    """The first of them that is made of numbers."""
    listed = [outputs] if isinstance(outputs, Tensor) else outputs
    return next(x for x in listed if isinstance(x, Tensor) and x.is_floating_point())


def _quantize(gm: fx.GraphModule, batches: Sequence[Sequence[Tensor]], static: bool) -> int:
    """``gm`` in W8A8; how many of its layers are. ``static``: inputs have the ranges of ``batches``, not of tokens."""
    spec = load_spec("w8a8-static" if static else "w8a8")
    resolved, _ = decide(gm, spec)
    with torch.no_grad():
        Pipeline(passes_for(spec)[len(canonical_passes()) :]).run(gm, [tuple(one) for one in batches])
    return sum(isinstance(one.decision, Plan) for one in resolved.values())


def _generates(gm: fx.GraphModule, model: Any) -> bool | None:
    """Whether greedy tokens are the model's; None where the graph has no caches."""
    compiled = CompiledModel(gm)
    if not compiled.can_generate():
        return None
    ids = text(1, 6)
    options: dict[str, Any] = {
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return torch.equal(wanted, compiled.generate(ids, attention_mask=torch.ones_like(ids), **options))


def plain(text: str) -> str:
    """An error without what differs between machines: places of files."""
    return re.sub(r"\(?/\S*/(\w+\.py):(\d+)", r"(\1", text).strip()


def known() -> dict[str, Row]:
    """What was kept of each family."""
    return {name: Row(**row) for name, row in json.loads(GOLDEN.read_text()).items()}


def keep(rows: Mapping[str, Row]) -> None:
    """Writes the rows, in the order of the families, a line each."""
    lines = [
        f"{json.dumps(one.name)}: {json.dumps(_without_defaults(rows[one.name]))}"
        for one in FAMILIES
        if one.name in rows
    ]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def without_error(row: Row) -> Row:
    """The same row but for the numbers that processors round differently."""
    return dataclasses.replace(row, error=None)


def _without_defaults(row: Row) -> dict[str, Any]:
    return {f.name: v for f in dataclasses.fields(row) if (v := getattr(row, f.name)) != f.default}


def document(rows: Mapping[str, Row]) -> str:
    """``docs/families.md``."""
    held = [one for one in FAMILIES if one.name in rows]
    good = [one for one in held if rows[one.name].is_captured]
    alone = [one for one in good if rows[one.name].captured == "dynamic"]
    by_token = [one for one in good if rows[one.name].captured == "token by token"]
    lines = [
        "# Families",
        "",
        "What graphq makes of the families of transformers 5.23, each by a model of a few layers with random weights.",
        (
            "`tests/test_families.py` measures every row again (`make test-all`, a few in `make test`); `python -m"
            " tests.families` measures"
        ),
        "what has changed, and `python -m tests.families --print > docs/families.md` writes this page.",
        "",
        (
            f"Of {len(held)} families {len(good)} are captured: {len(alone)} for texts and batches of any size,"
            f" {len(by_token)} as a graph of one token with"
        ),
        (
            "its states, by which texts are read, and the others with a dimension that is declared"
            " ([models.md](models.md#dimensions))."
        ),
        "",
        "- **captured**: whether sizes are dynamic; else what is fixed, or the words of the error.",
        "- **quantized**: the layers of the preset `w8a8` (vision models and those that are captured from examples:",
        "  `w8a8-static`), of those that could be named; the rest are heads, embeddings and routers.",
        "- **equal**: at how many of up to four sizes the float graph gives what the model does, within 1e-5 of the largest",
        "  value.",
        "- **W8A8 error**: of the first output, as a share of its norm.",
        f"- **greedy**: whether {NEW_TOKENS} tokens of `generate` are those of the model.",
    ]
    for kind, title in KINDS.items():
        own = [one for one in held if one.kind == kind]
        lines += ["", f"## {title}", "", "| family | class | captured | quantized | equal | W8A8 error | greedy |"]
        lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
        lines += [f"| {' | '.join(_cells(one, rows[one.name]))} |" for one in own]
    return "\n".join(lines) + "\n"


def _cells(family: Family, row: Row) -> list[str]:
    name = [family.name, f"`{family.model}`", row.captured.replace("|", "\\|")]
    if not row.is_captured:
        return [*name, "", "", "", ""]
    greedy = "" if row.generates is None else "yes" if row.generates else "no"
    error = "" if row.error is None else f"{row.error:.1%}"
    return [*name, f"{row.quantized} of {row.layers}", f"{row.equal} of {row.sizes}", error, greedy]


def main(arguments: Sequence[str]) -> None:
    """Measures the families of these names and kinds, or all; ``--print`` prints the document."""
    if "--print" in arguments:
        sys.stdout.write(document(known()))
        return
    rows = known() if GOLDEN.exists() else {}
    for family in FAMILIES:
        if not arguments or family.name in arguments or family.kind in arguments:
            rows[family.name] = measure(family)
            sys.stderr.write(f"{family.name}: {rows[family.name]}\n")
            keep(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
