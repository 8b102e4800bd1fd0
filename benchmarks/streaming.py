"""The memory and the time of checkpoints that are compiled tensor by tensor, or block by block, at two depths.

Llama checkpoints in bfloat16 of random weights are generated, the one deeper than the other. Each is compiled in a
process of its own, whose largest resident size the system tells (files that it read included) and is asserted, and
whose weights are then as in ``docs/models.md``: not in memory. Beside it stands the time of copying the checkpoint.

    python benchmarks/streaming.py [--layers 16 64] [--width 2048] [--specs w4a16 gptq] [--limit 2GiB 4GiB]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import graphq
from graphq.artifacts.shards import write_shards
from graphq.memory import bytes_of, in_words
from graphq.phases import peak_nbytes

TARGET = "compressed-tensors"
GPTQ: dict[str, Any] = {"graphq": 1, "weight": "int4/g128", "algorithms": [{"gptq": {}}]}


def generate(folder: Path, layers: int, width: int, vocabulary: int) -> int:
    """A checkpoint of random weights is there, which was never in memory; its bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 256,
        max_position_embeddings=2048,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        state = LlamaForCausalLM(config).state_dict()
    generator = torch.Generator().manual_seed(0)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in state.items():
            if tensor.dim() == 1:
                yield name, torch.ones(tensor.shape, dtype=torch.bfloat16)
            else:
                w = torch.empty(tensor.shape, dtype=torch.bfloat16).normal_(0, width**-0.5, generator=generator)
                yield name, w

    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    write_shards(folder, tensors(), 2_000_000_000)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def compile_one(folder: str, spec: str, out: str, samples: int, tokens: int) -> None:
    """Prints what a compile took, as JSON; imports are not counted as time, and are as memory."""
    import transformers  # noqa: F401  # pyright: ignore[reportUnusedImport]

    before, start, busy = peak_nbytes(), time.perf_counter(), time.process_time()
    options: dict[str, Any] = {}
    if spec == "gptq":
        vocabulary = json.loads((Path(folder) / "config.json").read_text())["vocab_size"]
        generator = torch.Generator().manual_seed(0)
        options["calibration"] = [
            torch.randint(0, vocabulary, (1, tokens), generator=generator) for _ in range(samples)
        ]
        options["scratch_dir"] = Path(out).parent
    made = graphq.compile(folder, GPTQ if spec == "gptq" else spec, target=TARGET, **options)
    captured = next(phase.seconds for phase in made._report.phases if phase.name == "capture")  # pyright: ignore[reportPrivateUsage]
    made.emit(TARGET, out, overwrite=True)
    print(
        json.dumps(
            {
                "seconds": time.perf_counter() - start,
                "capture": captured,
                "cpu": time.process_time() - busy,
                "imported": before,
                "peak": peak_nbytes(),
            }
        )
    )


def main() -> None:
    """Prints what each spec takes at each depth; fails where it is more than the limit, or grows with depth."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--specs", nargs="+", default=["w4a16", "gptq"])
    parser.add_argument("--limit", nargs="+", default=["2GiB", "4GiB"], help="for each spec")
    parser.add_argument("--growth", type=float, default=1.1, help="the deepest model's peak by the first one's")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch takes")
    parser.add_argument("--folder", type=Path, help="where checkpoints are made; default: a temporary place")
    parser.add_argument("--one", nargs=3, metavar=("FOLDER", "SPEC", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.one:
        source, spec, out = options.one
        compile_one(source, spec, out, options.samples, options.tokens)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as made:
        peaks: dict[str, list[int]] = {}
        for layers in options.layers:
            source = Path(made) / f"model-{layers}"
            size = generate(source, layers, options.width, options.vocabulary)
            start = time.perf_counter()
            subprocess.run(["cp", "-r", str(source), f"{made}/copy"], check=True)
            subprocess.run(["sync", f"{made}/copy"], check=True)
            copied = time.perf_counter() - start
            subprocess.run(["rm", "-r", f"{made}/copy"], check=True)
            print(f"{layers} layers of width {options.width}: {in_words(size)}, copied in {copied:.1f} s")
            for spec in options.specs:
                given = ["--samples", str(options.samples), "--tokens", str(options.tokens)]
                given += ["--threads", str(options.threads)]
                command = [sys.executable, __file__, "--one", str(source), spec, f"{made}/out", *given]
                run = subprocess.run(command, capture_output=True, text=True, check=True)
                found = json.loads(run.stdout.splitlines()[-1])
                peaks.setdefault(spec, []).append(found["peak"])
                print(
                    f"  {spec}: {found['seconds']:.1f} s, of which capture {found['capture']:.1f}; {found['cpu']:.1f} s"
                    f" of processors; {in_words(found['peak'])} at most, {in_words(found['imported'])} of it imports"
                )
            subprocess.run(["rm", "-r", str(source)], check=True)
    for spec, limit in zip(options.specs, options.limit, strict=False):
        assert max(peaks[spec]) <= bytes_of(limit), f"{spec}: {in_words(max(peaks[spec]))} of {limit}"
        assert peaks[spec][-1] <= options.growth * peaks[spec][0], f"{spec}: grows with depth: {peaks[spec]}"


if __name__ == "__main__":
    main()
