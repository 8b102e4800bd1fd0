"""Perplexity of the shipped language model by scheme and algorithm, as it is and with outlier channels put into it.

Usage: python benchmarks/accuracy.py [--schemes NAME,...] [--algorithms NAME,...] [--model plain | outliers]
                                     [--windows N] [--available]            (64 windows if none are asked for)

The second model is the first with the gains of some channels of its norms raised 20 to 60 times and the columns of the
linears that read them divided by as much: the same function, hard to quantize, as large language models are. The copy
is float32: in bfloat16, as the model is shipped, the quotients would be rounded. The last norm stays as it is, since
the head that reads it is tied to the embeddings.

Seconds are those of ``graphq.compile``. Exits 1 where an algorithm does not what it is for (``claims``); measured
alone, with ``--algorithms``, none is judged that needs the others. ``--available`` prints what graphq does not have yet
as such, instead of ending there.
"""

import argparse
import json
import operator
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import graphq
from graphq import evaluate
from graphq.errors import SpecError

MODEL: Final = Path(__file__).resolve().parents[1] / "examples" / "models" / "stdlib-llama"
SCHEMES: Final = {  # (weight, input)
    "w8a8-static": ("int8/channel", "int8/tensor"),
    "w8a8": ("int8/channel", "int8/token/dynamic"),
    "w4a16-g128": ("int4/g128", None),
    "w4a16-asym-g128": ("int4/asym/g128", None),
    "w4a16-g32": ("int4/g32", None),
    "w3a16-g64": ("int3/g64", None),
    "w4a8": ("int4/g128", "int8/token/dynamic"),
    "w4a4": ("int4/channel", "int4/token/dynamic"),
    "float8": ("float8_e4m3fn/channel", "float8_e4m3fn/token/dynamic"),
    "nvfp4": ("nvfp4", "nvfp4/dynamic"),
    "mxfp4": ("mxfp4", "mxfp4/dynamic"),
}
ROTATE: Final = {"rotate": {"r4": True}}  # the inputs of o_proj and down_proj at run time, as QuaRot does
SMOOTH_QUANT: Final = {"smooth-quant": {"alpha": 0.5}}
ALGORITHMS: Final[dict[str, list[str | dict[str, Any]]]] = {  # as a native spec lists them
    "rtn": [],
    "smooth-quant": [SMOOTH_QUANT],
    "awq": ["awq"],
    "gptq": ["gptq"],
    "rotate": [ROTATE],
    "auto-round": ["auto-round"],
    "smooth-quant+gptq": [SMOOTH_QUANT, "gptq"],
    "awq+gptq": ["awq", "gptq"],
    "rotate+gptq": [ROTATE, "gptq"],
}
SLOW: Final = "auto-round"  # minutes for each row: measured when asked for
MODELS: Final = ("plain", "outliers")
LOW: Final = tuple(name for name in SCHEMES if name.startswith(("w4a16", "w3a16")))
SAME_FUNCTION: Final = 1e-3
CHANNELS: Final = 4  # raised in each norm
NEAR: Final = 0.02
FAR: Final = 0.1
READERS: Final = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}

Found = Mapping[tuple[str, str, str], float]  # (model, scheme, algorithm) -> perplexity; the scheme "float" has none


def inject_outliers(source: Path, target: Path, seed: int = 0) -> None:
    """Write the Llama in ``source`` to ``target`` in float32, with raised gains and the same function."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors", "*.py"))
    tensors = {name: tensor.float() for name, tensor in load_file(source / "model.safetensors").items()}
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(tensors):
        block, _, norm = name.removesuffix(".weight").rpartition(".")
        if norm not in READERS:
            continue
        channels = torch.randperm(len(tensors[name]), generator=generator)[:CHANNELS]
        factors = 20 + 40 * torch.rand(CHANNELS, generator=generator)
        tensors[name][channels] *= factors
        for reader in READERS[norm]:
            tensors[f"{block}.{reader}.weight"][:, channels] /= factors
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2))


def measure(
    folder: Path, spec: dict[str, Any], calibration: tuple[Tensor, ...], windows: Tensor
) -> tuple[float, float]:
    """Perplexity, and the seconds of compiling."""
    start = time.perf_counter()
    compiled = graphq.compile(folder, spec, calibration=calibration)
    seconds = time.perf_counter() - start
    return evaluate.perplexity(compiled.module, windows, batch_size=32), seconds


def spec_of(scheme: str, algorithm: str) -> dict[str, Any]:
    """A native spec for all layers in the blocks."""
    weight, x = SCHEMES[scheme]
    rule = {"match": "blocks", "weight": weight} | ({"input": x} if x else {})
    return {"graphq": 1, "rules": [rule], "algorithms": ALGORITHMS[algorithm]}


def claims(found: Found) -> Iterator[tuple[str, float, Callable[[float, float], bool], float]]:
    """What must hold of the perplexities: (claim, value, comparison, bound), for all that was measured."""

    def both(model: str, scheme: str, better: str, worse: str) -> Iterator[tuple[str, float, Any, float]]:
        if {(model, scheme, better), (model, scheme, worse)} <= found.keys():
            claim = f"{model}, {scheme}: {better} below {worse}"
            yield claim, found[model, scheme, better], operator.lt, found[model, scheme, worse]

    limits = {"rtn": (operator.gt, FAR, "above"), "smooth-quant": (operator.le, NEAR, "within")}
    for algorithm, (holds, share, word) in limits.items():
        if ("outliers", "w8a8-static", algorithm) in found:
            claim = f"outliers, w8a8-static: {algorithm} {word} {share:.0%} of float"
            bound = found["outliers", "float", ""] * (1 + share)
            yield claim, found["outliers", "w8a8-static", algorithm], holds, bound
    for model in MODELS:
        for scheme in LOW:
            yield from both(model, scheme, "gptq", "rtn")
            yield from both(model, scheme, "awq", "rtn")
        yield from both(model, "w4a4", "rotate+gptq", "gptq")


def table(folders: Mapping[str, Path], options: argparse.Namespace) -> dict[tuple[str, str, str], float]:
    """Print what is measured; perplexity by model, scheme and algorithm. ``SystemExit`` for what graphq lacks."""
    tokenizer = evaluate.load_tokenizer(MODEL)
    windows = evaluate.standard_library_windows(tokenizer, count=options.windows)
    calibration = evaluate.calibration_windows(tokenizer).split(16)
    found: dict[tuple[str, str, str], float] = {}
    print(f"{options.windows} windows of {windows.shape[1]} tokens, Python {sys.version.split()[0]}")
    print(f"{'':<36}" + "".join(f"{model:^29}" for model in folders))
    print(f"{'scheme':<17}{'algorithm':<19}" + f"{'perplexity':>11}{'to float':>10}{'s':>7} " * len(folders))
    keep = {"graphq": 1, "rules": [{"match": "blocks", "float": True}]}
    line = f"{'float':<36}"
    for model, folder in folders.items():
        perplexity, seconds = measure(folder, keep, calibration, windows)
        found[model, "float", ""] = perplexity
        line += f"{perplexity:>11.3f}{'':>10}{seconds:>7.1f} "
    print(line, flush=True)
    for scheme in options.schemes:
        for algorithm in options.algorithms:
            if SCHEMES[scheme][1] is None and "smooth-quant" in algorithm:
                continue  # it makes inputs easier at the cost of weights
            line = f"{scheme:<17}{algorithm:<19}"
            for model, folder in folders.items():
                try:
                    perplexity, seconds = measure(folder, spec_of(scheme, algorithm), calibration, windows)
                except SpecError as error:
                    if "graphq has no " not in str(error):
                        raise
                    if not options.available:
                        raise SystemExit(f"{scheme}, {algorithm}: {error}") from error
                    line += f"{'not available':>28} "
                    continue
                found[model, scheme, algorithm] = perplexity
                change = perplexity / found[model, "float", ""] - 1
                shown = f"{change:+.2%}" if change < 10 else f"x {change + 1:.0f}"
                line += f"{perplexity:>11.3f}{shown:>10}{seconds:>7.1f} "
            print(line, flush=True)
    return found


def main(options: argparse.Namespace) -> int:
    """Print the table and the claims; 0 when all of these hold."""
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary, "outliers")
        inject_outliers(MODEL, copy)
        folders = {"plain": MODEL, "outliers": copy}
        found = table({name: folders[name] for name in folders if options.model in (None, name)}, options)
        shipped = found.get(("plain", "float", ""))
        copied = found.get(("outliers", "float", ""))
    broken = 0
    if shipped is not None and copied is not None and abs(copied / shipped - 1) > SAME_FUNCTION:
        raise SystemExit(f"the outliers change the float model: {shipped} to {copied}")
    for claim, value, holds, bound in claims(found):
        broken += not holds(value, bound)
        print(f"{'holds' if holds(value, bound) else 'BROKEN':<7}{claim} ({value:.3f}, {bound:.3f})")
    return int(broken > 0)


def _options() -> argparse.Namespace:
    def names_from(known: Mapping[str, object]) -> Callable[[str], list[str]]:
        def parse(text: str) -> list[str]:
            names = text.split(",")
            if unknown := [name for name in names if name not in known]:
                raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not one of {', '.join(known)}")
            return names

        return parse

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--schemes", type=names_from(SCHEMES), default=list(SCHEMES), metavar="NAME,...")
    parser.add_argument(
        "--algorithms",
        type=names_from(ALGORITHMS),
        default=[name for name in ALGORITHMS if name != SLOW],
        metavar="NAME,...",
    )
    parser.add_argument("--model", choices=MODELS, help="this one alone")
    parser.add_argument("--windows", type=int, default=64, help="windows to evaluate on")
    parser.add_argument("--available", action="store_true", help="print what graphq does not have yet as such")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main(_options()))
