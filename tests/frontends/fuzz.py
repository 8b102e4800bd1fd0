"""Feeds one frontend documents made of its examples' parts, guided by coverage: nothing but ``SpecError`` may come out.

``python tests/frontends/fuzz.py DIALECT SECONDS`` needs atheris. What is read must be printed and read again to the same
spec, and what is written in a dialect must be read again.
"""

import copy
import os
import sys
from pathlib import Path
from typing import Any

import atheris as atheris_module

atheris: Any = atheris_module  # its types are those of the extension alone
with atheris.instrument_imports(include=["graphq.frontends"]):
    from graphq.errors import SpecError
    from graphq.frontends import DIALECTS, load_spec, print_spec, write_spec
    from graphq.frontends.yaml_text import read_file
    from graphq.spec.match import Layer
    from graphq.spec.plan import Plan
    from graphq.spec.rules import Spec, resolve

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
NAMES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
LAYERS = {
    layer.fqn: layer
    for layer in (
        *(Layer(f"model.layers.{b}.{name}", "linear", (256, 256), b) for b in range(6) for name in NAMES),
        Layer("lm_head", "linear", (256, 256), named_only="output head"),
    )
}
NUMBERS = (0, 1, -1, 2, 3, 4, 5, 8, 16, 17, 32, 48, 64, 100, 128, 9999, 2**31, 2**63, 0.0, 0.5, 1.5, -0.5, 1e30, 1e-30)
ODD = (
    "",
    " ",
    "*",
    "re:",
    "re:(",
    "re:.*",
    "~",
    "#",
    "#0-1",
    "a#5..2",
    "=",
    "\0",
    "é",
    "null",
    "1e3",
    "x" * 99,
    "../a",
)


def places(data: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The key paths of all values in a document."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [at, *(path for key, value in items for path in places(value, (*at, key)))]


def words_of(documents: list[dict[str, Any]]) -> list[str]:
    """Every key and text in the documents."""
    found: dict[str, None] = dict.fromkeys(ODD)
    for document in documents:
        for path in places(document):
            value: Any = document
            for key in path:
                value = value[key]
                if isinstance(key, str):
                    found[key] = None
            if isinstance(value, str):
                found[value] = None
    return list(found)


def made_value(data: Any, words: list[str], depth: int) -> Any:
    """A value of any kind, made of what the fuzzer gives."""
    match data.ConsumeIntInRange(0, 8 if depth else 6):
        case 0 | 1:
            return words[data.ConsumeIntInRange(0, len(words) - 1)]
        case 2:
            return NUMBERS[data.ConsumeIntInRange(0, len(NUMBERS) - 1)]
        case 3:
            return data.ConsumeIntInRange(-300, 300)
        case 4:
            return data.ConsumeBool()
        case 5:
            return None
        case 6:
            return data.ConsumeUnicode(8)
        case 7:
            return [made_value(data, words, depth - 1) for _ in range(data.ConsumeIntInRange(0, 3))]
        case _:
            keys = [words[data.ConsumeIntInRange(0, len(words) - 1)] for _ in range(data.ConsumeIntInRange(0, 3))]
            return {key: made_value(data, words, depth - 1) for key in keys}


def mutate(data: Any, document: dict[str, Any], words: list[str]) -> None:
    """Replaces, adds or takes out some values of ``document``."""
    for _ in range(data.ConsumeIntInRange(1, 4)):
        all_places = places(document)[1:]
        if not all_places:
            return
        *path, last = all_places[data.ConsumeIntInRange(0, len(all_places) - 1)]
        section: Any = document
        for key in path:
            section = section[key]
        match data.ConsumeIntInRange(0, 3):
            case 0:
                del section[last]
            case 1 if isinstance(section, dict):
                section[words[data.ConsumeIntInRange(0, len(words) - 1)]] = made_value(data, words, 2)
            case 1:
                section.append(made_value(data, words, 2))
            case _:
                section[last] = made_value(data, words, 2)


def decisions(spec: Spec) -> dict[str, object] | None:
    """The plan of every layer of a small model, None for those that stay float; None where a rule matches nothing."""
    try:
        resolved, _ = resolve(spec, LAYERS)
    except SpecError:
        return None
    return {fqn: found.decision if isinstance(found.decision, Plan) else None for fqn, found in resolved.items()}


def check(source: Any, dialect: str | None) -> None:
    """Reads the document; if it is a spec, prints it and writes it in every dialect, and reads that again."""
    try:
        spec = load_spec(source, dialect)
    except SpecError:
        return
    if load_spec(print_spec(spec), "native") != spec:
        raise AssertionError("the native text reads as another spec")
    for other in DIALECTS:
        try:
            text = write_spec(spec, other)
        except SpecError:
            continue
        if decisions(load_spec(text, other)) != decisions(spec):
            raise AssertionError(f"{other}: what was written decides otherwise")


def main(dialect: str, seconds: int) -> None:
    """Fuzzes for so long; an uncaught exception, or a document that takes ten seconds, ends it with another status."""
    files = [path for path in sorted((CONFIGS / dialect).iterdir()) if path.stat().st_size < 20_000]
    texts = [path.read_text(encoding="utf-8") for path in files]
    documents: list[Any] = [read_file(path).root for path in files]
    words = words_of(documents)

    def one(given: bytes) -> None:
        data = atheris.FuzzedDataProvider(given)
        which = data.ConsumeIntInRange(0, len(files) - 1)
        if data.ConsumeIntInRange(0, 3):
            document = copy.deepcopy(documents[which])
            mutate(data, document, words)
            check(document, dialect)
        else:
            text = texts[which]
            start = data.ConsumeIntInRange(0, len(text))
            end = min(len(text), start + data.ConsumeIntInRange(0, 20))
            check(text[:start] + data.ConsumeUnicode(10) + text[end:] + "\n", dialect)

    limits = [f"-max_total_time={seconds}", "-timeout=10", "-rss_limit_mb=4096", "-max_len=200", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *limits, f"-artifact_prefix={os.devnull}-"], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
