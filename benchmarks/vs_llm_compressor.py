"""graphq beside llm-compressor: the same model, calibration tokens and schemes; perplexity, seconds and memory.

Usage: python benchmarks/vs_llm_compressor.py [--peer PYTHON] [--rounds N] [--windows N] [--rows WORD,...] [--available]

``make bench-peers`` installs the peer into an environment of its own (benchmarks/peers.txt) and runs this. Each tool
has a process that stays; in every round each quantizes the model once, alone on the machine, and the medians of the
rounds are compared. Measured are ``oneshot`` and ``graphq.compile`` to the QDQ form, capture included, from a loaded
transformers model; imports, loading, saving and one run to warm up are not. Perplexity is that of
``graphq.evaluate.perplexity`` in both processes, of each tool's own result, quantized activations included.

Exits 1 where graphq's perplexity is worse by more than 0.2 %, its time more than the row's share of the peer's, or its
peak of memory higher. Rows that round to nearest are controls: both tools must give the same. ``--available`` prints
the rows whose algorithms graphq does not have as such, with the peer's numbers, instead of ending there.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from peers.rows import ROWS, Row
from safetensors.torch import save_file

from graphq import evaluate

ROOT: Final = Path(__file__).resolve().parents[1]
MODEL: Final = ROOT / "examples" / "models" / "stdlib-llama"
QUALITY: Final = 0.002
SAME_FLOAT: Final = 1e-4  # the two versions of transformers compute the same model
SAME_SCHEME: Final = 5e-4
WARM_UP: Final = 16  # windows


@final
class Worker:
    """A process that quantizes and measures with one tool."""

    def __init__(self, python: str, tool: str, folder: Path, threads: int) -> None:
        command = [python, str(ROOT / "benchmarks" / "peers" / "worker.py")]
        command += [tool, str(MODEL), str(folder / "tokens.safetensors"), str(threads)]
        self.log = folder / f"{tool}.log"
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=folder,
                env=environment,
            )

    def ask(self, task: Any, samples: int, batch_size: int, perplexity: bool) -> dict[str, Any]:
        """The answer to one request; ``SystemExit`` with the process's last lines where it ends instead."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        request = {"task": task, "samples": samples, "batch_size": batch_size, "evaluate": perplexity}
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            reply = self.process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if not reply:
            raise SystemExit(f"{self.process.args}\nended:\n" + "\n".join(self.log.read_text().splitlines()[-30:]))
        return json.loads(reply)

    def stop(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@final
@dataclass(frozen=True)
class Result:
    """The medians of one tool's rounds on one row."""

    perplexity: float
    seconds: float
    megabytes: float

    @classmethod
    def of(cls, answers: list[dict[str, Any]]) -> "Result":
        """What the answers hold; the first of them has the perplexity."""
        seconds, megabytes = (statistics.median(a[key] for a in answers) for key in ("seconds", "megabytes"))
        return cls(answers[0]["perplexity"], seconds, megabytes)


def misses(row: Row, ours: Result, theirs: Result) -> list[str]:
    """A line for each target that graphq misses."""
    found: list[str] = []
    change = ours.perplexity / theirs.perplexity - 1
    if row.time is None:
        return [f"{row.name}: perplexity differs by {change:.3%}"] if abs(change) > SAME_SCHEME else []
    if not ours.perplexity <= theirs.perplexity * (1 + QUALITY):
        found.append(f"perplexity {ours.perplexity:.3f}, theirs {theirs.perplexity:.3f}: {change:.2%} worse")
    if ours.seconds > theirs.seconds * row.time:
        found.append(f"{ours.seconds:.1f} s, theirs {theirs.seconds:.1f} s; at most {row.time:.2g} of that")
    if ours.megabytes > theirs.megabytes:
        found.append(f"{ours.megabytes:.0f} MB, theirs {theirs.megabytes:.0f} MB")
    return [f"{row.name}: {miss}" for miss in found]


def compare(row: Row, ours: Worker, theirs: Worker, options: argparse.Namespace) -> list[str]:
    """Print a row; the targets it misses. ``SystemExit`` where graphq has not what it needs and must."""
    answers: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for round_ in range(options.rounds):
        for worker, task, into in ((ours, row.spec, answers[0]), (theirs, row.recipe, answers[1])):
            reply = worker.ask(task, options.samples, options.batch_size, perplexity=round_ == 0)
            into.append(reply)
            if "refused" in reply and not options.available:
                raise SystemExit(f"{row.name}: {reply['refused']}")
    theirs_found = Result.of(answers[1])
    peer = f"{theirs_found.seconds:>8.2f}{theirs_found.megabytes:>8.0f}"
    if "refused" in answers[0][0]:
        print(f"{row.name:<37}{theirs_found.perplexity:>18.3f}{'not available':>25}{peer}", flush=True)
        return []
    found = Result.of(answers[0])
    change = found.perplexity / theirs_found.perplexity - 1
    quality = f"{found.perplexity:>9.3f}{theirs_found.perplexity:>9.3f}{change:>+9.2%}"
    ratio = found.seconds / theirs_found.seconds
    print(f"{row.name:<37}{quality}{found.seconds:>8.2f}{found.megabytes:>8.0f}{peer}{ratio:>7.2f}", flush=True)
    return misses(row, found, theirs_found)


def main(options: argparse.Namespace) -> int:
    """Print the table and the misses; 0 where there are none."""
    rows = [
        row for row in ROWS if not options.rows or any(w in row.name.lower() for w in options.rows.lower().split(","))
    ]
    if not rows:
        raise SystemExit(f"--rows: {options.rows}: in none of {', '.join(row.name for row in ROWS)}")
    if not Path(options.peer).exists():
        raise SystemExit(f"--peer: {options.peer}: no such file; make bench-peers installs it")
    tokenizer = evaluate.load_tokenizer(MODEL)
    tokens = {
        "calibration": evaluate.calibration_windows(tokenizer, count=options.samples),
        "evaluation": evaluate.standard_library_windows(tokenizer, count=options.windows),
    }
    held = f"{options.samples} x {tokens['calibration'].shape[1]} tokens in batches of {options.batch_size}"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_file(tokens, folder / "tokens.safetensors")
        ours = Worker(sys.executable, "graphq", folder, options.threads)
        theirs = Worker(options.peer, "llm-compressor", folder, options.threads)
        try:
            plain = [worker.ask(None, 0, 0, perplexity=True)["perplexity"] for worker in (ours, theirs)]
            if abs(plain[0] / plain[1] - 1) > SAME_FLOAT:
                raise SystemExit(f"the float model's perplexity is {plain[0]} here and {plain[1]} there")
            print(f"float {plain[0]:.3f} on {options.windows} windows, {options.rounds} rounds; calibrated on {held}")
            print(f"{'':<37}{'perplexity':^27}{'graphq':^16}{'llm-compressor':^16}")
            print(f"{'':<37}{'graphq':>9}{'peer':>9}{'':>9}" + f"{'s':>8}{'MB':>8}" * 2 + f"{'time':>7}", flush=True)
            for worker, task in ((ours, rows[0].spec), (theirs, rows[0].recipe)):
                worker.ask(task, min(WARM_UP, options.samples), options.batch_size, perplexity=False)
            missed = [miss for row in rows for miss in compare(row, ours, theirs, options)]
        finally:
            ours.stop()
            theirs.stop()
    for miss in missed:
        print(f"missed: {miss}")
    return int(bool(missed))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--peer", default=str(ROOT / ".venv-peers" / "bin" / "python"), help="the peer's Python")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--windows", type=int, default=320, help="windows to evaluate on")
    parser.add_argument("--samples", type=int, default=128, help="windows to calibrate on")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", default="", help="words, one of which a row's name must hold")
    parser.add_argument("--available", action="store_true", help="print what graphq does not have yet as such")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main(_options()))
