"""Changes of an artifact's files at random; as a program, it loads and calls many changed artifacts."""

import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

import graphq
from graphq.errors import GraphqError
from tests.models import MLP

X = torch.ones(2, 8)
STATIC = {"match": "*", "weight": "int8/channel", "input": "int8/asym/tensor"}
VALUES = (
    None,
    -1,
    0,
    1,
    7,
    2**31,
    -(2**63),
    10**30,
    1.5,
    "",
    "x",
    [],
    {},
    [[]],
    True,
    {"node": "x"},
    {"dtype": "int8"},
)


def save(folder: Path) -> Path:
    """A small artifact with a packed weight and an integer product."""
    torch.manual_seed(0)
    rules = [{"match": "up", "weight": "int4/asym/g4"}, STATIC | {"match": "down"}]
    graphq.compile(MLP(), {"graphq": 1, "rules": rules}, inputs=X, calibration=[X]).save(folder)
    return folder


def places(data: Any) -> list[tuple[Any, Any]]:
    """Every container in the data with each of its keys."""
    keys = list(data) if isinstance(data, dict) else list(range(len(data))) if isinstance(data, list) else []
    return [(data, key) for key in keys] + [place for key in keys for place in places(data[key])]


def change(data: Any, draw: random.Random) -> None:
    """One entry is changed, removed, doubled, or takes the value of another."""
    found = places(data)
    holder, key = draw.choice(found)
    match draw.randrange(4):
        case 0:
            del holder[key]
        case 1:
            other, place = draw.choice(found)
            holder[key] = json.loads(json.dumps(other[place]))
        case _:
            holder[key] = draw.choice(VALUES)


def tamper(folder: Path, draw: random.Random) -> None:
    """One of the files is changed."""
    name = draw.choice(("graph.json", "graph.json", "graphq.json", "model.safetensors"))
    file = folder / name
    raw = bytearray(file.read_bytes())
    if name == "model.safetensors" or draw.random() < 0.1:
        end = 8 + int.from_bytes(raw[:8], "little") if name == "model.safetensors" else len(raw)
        for _ in range(draw.randrange(1, 4)):
            raw[draw.randrange(end)] = draw.randrange(256)
        file.write_bytes(raw[: draw.randrange(len(raw))] if draw.random() < 0.1 else raw)
        return
    data = json.loads(raw)
    for _ in range(draw.choice((1, 1, 2, 5))):
        change(data, draw)
    file.write_text(json.dumps(data))


def main(made: Path, place: Path, cases: int) -> None:
    """Prints how many of the cases were refused, and how many were loaded."""
    torch.set_num_threads(1)
    loaded = 0
    for case in range(cases):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(made, place)
        tamper(place, random.Random(case))
        print(case, file=sys.stderr)
        try:
            model = graphq.load(place, verify=False)
        except GraphqError:
            continue
        loaded += 1
        try:
            model(X)
        except Exception:  # noqa: BLE001
            continue  # an op refuses its arguments
    print(cases - loaded, loaded)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
