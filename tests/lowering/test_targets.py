"""The table of targets, and their options as their emitters declare them."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_type_hints

import pytest
import typer
from torch import fx

from graphq.cli import app
from graphq.errors import TargetError
from graphq.lowering import targets
from graphq.lowering.targets import (
    TARGETS,
    Target,
    check_options,
    in_words,
    options_of,
    read_option,
    read_options,
    target_named,
)

ROOT = Path(__file__).parents[2]


def emit_everything(
    gm: fx.GraphModule,
    path: Path,
    made_from: dict[str, Any],
    *,
    overwrite: bool = False,
    shard_size: int | None = None,
    layout: Literal["flat", "tiled"] = "flat",
    suffix: str = "",
    level: Literal[1, 2] = 1,
    sizes: Mapping[str, int] | None = None,
) -> tuple[str, ...]:
    """A target with an option of each type."""
    return ()


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> str:
    row = Target(emit_everything, *(TARGETS["torch"].__dict__[name] for name in ("tensors", "open", "form", "files")))
    monkeypatch.setitem(targets.TARGETS, "everything", row)  # pyright: ignore[reportArgumentType]
    return "everything"


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_declares_its_options_by_keyword(name: str) -> None:
    emit = target_named(name).emit
    first, *rest = inspect.signature(emit).parameters.values()
    assert [one.name for one in (first, *rest)][:3] == ["gm", "path", "made_from"]
    assert {one.kind for one in rest[2:]} == {inspect.Parameter.KEYWORD_ONLY}
    assert all(one.default is not inspect.Parameter.empty for one in rest[2:])
    options = options_of(name)
    assert options["overwrite"] is bool
    assert options == {key: kind for key, kind in get_type_hints(emit).items() if key in options}
    assert all(in_words(kind) for kind in options.values())
    check_options(name, {one.name: one.default for one in rest[2:]})


def test_the_options_of_today() -> None:
    assert {name: options_of(name) for name in TARGETS} == {
        "torch": {"overwrite": bool},
        "onnx": {
            "overwrite": bool,
            "cache": bool,
            "opset": int | None,
            "bfloat16": bool,
            "profile": str | None,
            "shapes": Mapping[str, int] | None,
        },
        "compressed-tensors": {
            "overwrite": bool,
            "consumer": Literal["vllm", "transformers", "any"],
            "shard_bytes": int,
        },
        "ascend": {
            "overwrite": bool,
            "consumer": Literal["vllm-ascend", "any"],
            "layout": Literal["v1", "v0"],
            "prefill": Literal["static", "dynamic"],
            "tp": int,
            "shard_bytes": int,
        },
    }


def test_the_documents_name_every_target_and_option() -> None:
    text = (ROOT / "docs" / "targets.md").read_text(encoding="utf-8")
    for name in TARGETS:
        assert f'"{name}"' in text
        assert all(f"| `{option}` |" in text for option in options_of(name))


def test_the_command_line_names_every_target() -> None:
    command: Any = typer.main.get_command(app)
    (option,) = (one for one in command.commands["compile"].params if one.name == "target")
    assert f"What to write, {' or '.join(TARGETS)};" in option.help


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("overwrite=true", True),
        ("overwrite=false", False),
        ("shard_size=12", 12),
        ("shard_size=-3", -3),
        ("shard_size=null", None),
        ("layout=tiled", "tiled"),
        ("suffix=true", "true"),
        ("suffix=a=b", "a=b"),
        ("suffix=7", "7"),
        ("level=2", 2),
        ("sizes=a=1", {"a": 1}),
        ("sizes=a=1,b + c=20, d.e=-3", {"a": 1, "b + c": 20, "d.e": -3}),
        ("sizes=null", None),
    ],
)
def test_an_option_as_text(text: str, value: object, everything: str) -> None:
    name, found = read_option(everything, text)
    assert (name, found, type(found)) == (text.partition("=")[0], value, type(value))
    check_options(everything, {name: found})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("overwrite=1", "overwrite: '1' is not true or false"),
        ("overwrite=True", "overwrite: 'True' is not true or false"),
        ("shard_size=true", "shard_size: 'true' is not a whole number or null"),
        ("shard_size=--3", "shard_size: '--3' is not a whole number or null"),
        ("layout=round", "layout: 'round' is not one of flat, tiled"),
        ("level=true", "level: 'true' is not one of 1, 2"),
        ("level=3", "level: '3' is not one of 1, 2"),
        ("sizes=1", "sizes: '1' is not whole numbers by name or null"),
        ("sizes=a=1.5", "sizes: 'a=1.5' is not whole numbers by name or null"),
        ("sizes=a=1,", "sizes: 'a=1,' is not whole numbers by name or null"),
        ("sizes=a=1,a=2", "sizes: 'a=1,a=2' is not whole numbers by name or null"),
        ("shards=3", "no option shards; there are overwrite, shard_size, layout, suffix, level, sizes"),
        ("overwrite", "overwrite: write NAME=VALUE; there are overwrite, shard_size, layout, suffix, level, sizes"),
    ],
)
def test_bad_text(text: str, problem: str, everything: str) -> None:
    with pytest.raises(TargetError) as caught:
        read_option(everything, text)
    assert str(caught.value) == f"everything: {problem}"


def test_options_as_text(everything: str) -> None:
    assert read_options(everything, ["level=2", "suffix=x"]) == {"level": 2, "suffix": "x"}
    assert read_options(everything, []) == {}
    with pytest.raises(TargetError, match=r"^everything: level: is given twice$"):
        read_options(everything, ["level=2", "level=1"])


def test_a_value_of_another_type(everything: str) -> None:
    check_options(everything, {"shard_size": None, "level": 2, "layout": "flat"})
    for name, value in (("shard_size", True), ("level", True), ("suffix", None), ("layout", 1)):
        with pytest.raises(TargetError, match=f"everything: {name}: {value!r} is not "):
            check_options(everything, {name: value})


def test_a_target_that_there_is_not() -> None:
    for ask in (
        lambda: check_options("tflite", {}),
        lambda: read_options("tflite", []),
        lambda: options_of("tflite"),
        lambda: target_named("tflite"),
    ):
        with pytest.raises(
            TargetError, match=r"^tflite: no such target; there are torch, onnx, compressed-tensors, ascend$"
        ):
            ask()
