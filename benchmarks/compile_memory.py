"""The memory and the time of a weight-only compile: a 0.35 B Llama in bfloat16 of random weights, from its directory.

Each spec is compiled and saved in a process of its own, whose largest resident size the system tells (files that it
read included), beside the bytes of the checkpoint; phases are those of the report.

    python benchmarks/compile_memory.py [--layers 24] [--width 1024] [--threads 0] [SPEC ...]
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import graphq


def save(folder: Path, layers: int, width: int) -> int:
    """The model's directory is there; the bytes of its weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 256,
        max_position_embeddings=2048,
    )
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def compile_one(folder: str, spec: str, out: str) -> None:
    """Prints what a compile took, with the time since this process began to import."""
    start = time.process_time()
    made = graphq.compile(folder, spec)
    made.save(out, overwrite=True)
    print("\n".join(made.report.phase_lines()))
    peak = max(phase.peak_nbytes or 0 for phase in made.report.phases)
    print(f"CPU {time.process_time() - start:.1f} s, peak {peak}")


def main() -> None:
    """Prints what each spec takes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("specs", nargs="*", default=["w4a16", "w8a8"], metavar="SPEC")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch takes")
    parser.add_argument("--one", nargs=3, metavar=("FOLDER", "SPEC", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.one:
        compile_one(*options.one)
        return
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model"
        size = save(source, options.layers, options.width)
        print(f"checkpoint {size / 1e9:.2f} GB, {torch.get_num_threads()} thread(s), torch {torch.__version__}")
        for spec in options.specs:
            arguments = ["--one", str(source), spec, f"{folder}/out", "--threads", str(options.threads)]
            run = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=True)
            print(f"\n{spec}\n{run.stdout.strip()}")
            print(f"peak / checkpoint: {int(run.stdout.rsplit(' ', 1)[1]) / size:.2f}")


if __name__ == "__main__":
    main()
