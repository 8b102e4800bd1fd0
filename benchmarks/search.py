"""Mixed precision by search against uniform formats and positions, at equal bytes, on the shipped language model.

    python benchmarks/search.py [--model plain | outliers] [--sets weights,mx,mixed] [--windows 64] [--samples 16]

For each set of options six budgets strictly inside of its range, and at each: the search's mix, the uniform options
that fit, the largest options for the first layers or for the last, and five mixes that are drawn and fill the budget.
Perplexity is of held-out text, which no search sees. Exits 1 where the search is not below all others.
"""

import argparse
import random
import sys
import tempfile
from pathlib import Path
from typing import Final

from accuracy import MODEL, inject_outliers

import graphq
from graphq import evaluate
from graphq.mixed_precision.driver import Found, find
from graphq.mixed_precision.mixes import filled
from graphq.mixed_precision.rules import compact_rules

SETS: Final = {
    "weights": "int2/g64,int3/g64,int4/g128,int8/channel",
    "mx": "mxfp4,mxfp8",
    "mixed": "int4/g128,float8_e4m3fn/channel",
}
BUDGETS: Final = 6
DRAWN: Final = 5


def others(found: Found, most: int, seed: int) -> dict[str, tuple[int, ...]]:
    """The mixes of at most this size that are no search's."""
    sizes, count = found.sizes, len(found.groups)
    mixes = {
        "head first": filled(sizes, range(count), most),
        "tail first": filled(sizes, range(count)[::-1], most),
    }
    for name in dict.fromkeys(name for group in found.groups for name in group.options):
        mix = tuple(group.options.index(name) for group in found.groups)
        if sum(own[choice] for own, choice in zip(sizes, mix, strict=True)) <= most:
            mixes[f"uniform {name}"] = mix
    generator = random.Random(seed)
    for number in range(DRAWN):
        mixes[f"drawn {number}"] = filled(sizes, generator.sample(range(count), count), most)
    return mixes


def main(options: argparse.Namespace) -> int:
    """Print a line for each budget; 1 where a search is not the best."""
    tokenizer = evaluate.load_tokenizer(MODEL)
    windows = evaluate.standard_library_windows(tokenizer, count=options.windows)
    calibration = evaluate.calibration_windows(tokenizer, count=options.samples).split(4)
    lost = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = MODEL
        if options.model == "outliers":
            folder = Path(temporary, "outliers")
            inject_outliers(MODEL, folder)
        for name in options.sets.split(","):
            scores = Path(temporary, f"{name}.json")
            whole = find(folder, SETS[name], "1000000000B", calibration=calibration, exchanges=0, scores=scores)
            least, largest = (sum(map(pick, whole.sizes)) for pick in (min, max))
            numel = sum(group.numel for group in whole.groups)
            print(f"{options.model}, {SETS[name]}: {8 * least / numel:.2f} to {8 * largest / numel:.2f} bits")
            for step in range(1, BUDGETS + 1):
                most = least + (largest - least) * step // (BUDGETS + 1)
                found = find(folder, SETS[name], f"{most}B", calibration=calibration, scores=scores)
                measured = {"search": evaluate.perplexity(graphq.compile(folder, found.spec), windows)}
                for origin, mix in others(found, most, step).items():
                    decisions = {
                        fqn: decision
                        for group, choice in zip(found.groups, mix, strict=True)
                        for fqn, decision in group.decisions[choice].items()
                    }
                    spec = graphq.Spec(compact_rules(decisions, found.layers))
                    measured[origin] = evaluate.perplexity(graphq.compile(folder, spec), windows)
                best = min(measured, key=lambda origin: measured[origin])
                second = min((value, origin) for origin, value in measured.items() if origin != "search")
                lost += best != "search"
                shown = "  ".join(f"{origin} {value:.3f}" for origin, value in measured.items())
                print(
                    f"  {8 * most / numel:.2f} bits: next {second[1]} {second[0] / measured['search']:.3f} x  {shown}",
                    flush=True,
                )
    print("the search is below all others" if not lost else f"the search is beaten at {lost} budgets")
    return 1 if lost else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=("plain", "outliers"), default="plain")
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--samples", type=int, default=16)
    sys.exit(main(parser.parse_args()))
