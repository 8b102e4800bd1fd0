"""Atheris damages files for a minute, led by what code it reaches: readers raise ``GraphqError`` and nothing else.

Of a small model's artifacts for torch, compressed-tensors and Ascend, one file at a time is what libFuzzer makes of it:
the manifest, the weights, the graph, the configuration, the description, what algorithms chose; or a spec of any
dialect. Usage: run_atheris.py [SECONDS].
"""

import contextlib
import importlib
import logging
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

atheris: Any = importlib.import_module("atheris")

with atheris.instrument_imports(include=["graphq"], enable_loader_override=False):
    from graphq.artifacts.inspect import inspect
    from graphq.errors import GraphqError
    from graphq.frontends import load_spec
    from graphq.lowering.checkpoints.inspect import inspect_checkpoint
    from graphq.runtime.model import CompiledModel  # noqa: F401  # pyright: ignore[reportUnusedImport]
    from graphq.verifier import verify

ROOT = Path(__file__).resolve().parents[1]
Reader = Callable[[Path], object]
# Each file of an artifact that is damaged, with what reads it.
ARTIFACTS: dict[str, tuple[str, ...]] = {
    "torch": ("graphq.json", "graph.json", "model.safetensors", "graphq.choices"),
    "compressed-tensors": ("config.json", "model.safetensors", "graphq.json"),
    "ascend": ("quant_model_description.json", "quant_model_weights.safetensors.index.json", "config.json"),
}


def made(folder: Path) -> dict[str, Path]:
    """The artifacts of a model so small that a file of it is read in a millisecond or two."""
    import torch
    import transformers

    import graphq

    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "head_dim": 16}
    config = transformers.LlamaConfig(vocab_size=16, num_hidden_layers=1, num_key_value_heads=2, **sizes)
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).eval()
    model.save_pretrained(folder / "model")
    spec = {"graphq": 1, "weight": "int8/channel", "input": "int8/token/dynamic", "algorithms": [{"smooth-quant": {}}]}
    found: dict[str, Path] = {}
    for target in ARTIFACTS:
        options: dict[str, Any] = {} if target == "torch" else {"target": target}
        compiled = graphq.compile(folder / "model", spec, calibration=[torch.arange(1, 9).view(2, 4)], **options)
        compiled.emit(target, folder / target)
        found[target] = folder / target
    return found


def readers_of(target: str, name: str, folder: Path) -> Sequence[Reader]:
    """What reads this file of the artifact."""
    if name == "graphq.choices":
        return (lambda path: verify(path, folder / "model"),)
    if target == "torch":
        return verify, inspect
    return (verify, inspect) if name == "graphq.json" else (verify, inspect_checkpoint)


def specs() -> list[bytes]:
    """Specs of every dialect, to begin with."""
    files = sorted((ROOT / "examples" / "configs").rglob("*.y*ml"))
    return [data for file in files if len(data := file.read_bytes()) < 1500]


def fuzz(seconds: str, folder: Path) -> None:
    """Never returns: libFuzzer ends the process, with another status than 0 where a reader raised something else."""
    logging.disable(logging.CRITICAL)
    artifacts = made(folder)
    places = [
        (target, name) for target, names in ARTIFACTS.items() for name in names if (artifacts[target] / name).is_file()
    ]
    whole = {place: (artifacts[place[0]] / place[1]).read_bytes() for place in places}

    def once(data: bytes) -> None:
        choice = data[0] % (len(places) + 1) if data else len(places)
        if choice == len(places):
            with contextlib.suppress(GraphqError):
                load_spec(data[1:].decode(errors="replace") + "\n")
            return
        target, name = place = places[choice]
        file = artifacts[target] / name
        file.write_bytes(data[1:])
        try:
            for read in readers_of(target, name, folder):
                with contextlib.suppress(GraphqError):
                    read(artifacts[target])
        finally:
            file.write_bytes(whole[place])

    corpus = folder / "corpus"
    corpus.mkdir()
    for number, place in enumerate(places):
        (corpus / f"file-{number}").write_bytes(bytes([number]) + whole[place])
    for number, data in enumerate(specs()):
        (corpus / f"spec-{number}").write_bytes(bytes([len(places)]) + data)
    for name in sorted(path.name for path in corpus.iterdir()):  # as they are, they are read
        once((corpus / name).read_bytes())
    limits = [f"-max_total_time={seconds}", "-max_len=200000", "-timeout=60", "-rss_limit_mb=6000", "-len_control=0"]
    atheris.Setup([sys.argv[0], *limits, f"-artifact_prefix={folder}/", str(corpus)], once)
    atheris.Fuzz()


def main(arguments: Sequence[str]) -> int:
    """1 where a reader raised something else, after what it was given."""
    if len(arguments) == 2:
        fuzz(arguments[0], Path(arguments[1]))
    with tempfile.TemporaryDirectory(prefix="graphq-atheris-") as folder:
        command = [sys.executable, __file__, *(arguments or ["60"]), folder]
        status = subprocess.run(command, check=False).returncode
        for found in Path(folder).glob("crash-*"):  # what was damaged, and how
            print(f"the input, in hexadecimal: {found.read_bytes()[:4000].hex()}")
    return int(status != 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
