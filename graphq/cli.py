"""The command line: ``compile``, ``explain``, ``dump``, ``eval`` and ``verify``.

Results go to the standard output, everything else to the standard error. Exit status: 0; 1 for errors, a line each;
2 for wrong usage; 130 when interrupted. Heavy libraries are imported when a command runs: ``--help`` answers at once.
"""

import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NoReturn, ParamSpec, TypeVar

import typer

from graphq.errors import GraphError, GraphqError, PassError, SpecError

if TYPE_CHECKING:
    from torch import Tensor

    from graphq.evaluate import Tokenizer
    from graphq.report import Report

P = ParamSpec("P")
T = TypeVar("T")

app: Final = typer.Typer(
    help="Compile PyTorch models into quantized artifacts: any spec dialect in, torch or ONNX out.",
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Model = Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="A Hugging Face model directory.")]
SpecFile = Annotated[Path, typer.Option("--spec", metavar="FILE", help="The spec, a YAML file in any dialect.")]
Dialect = Annotated[str | None, typer.Option(help="The spec's dialect, where it cannot be recognised: native, llmc.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON: a list with one object for each layer.")]
Calibration = Annotated[
    Path | None, typer.Option(metavar="FILE|DIR", help="Text to calibrate on: a file, or all files in a directory.")
]
Samples = Annotated[int, typer.Option(min=1, help="Windows of text to calibrate on; fewer if the text ends before.")]
Length = Annotated[int, typer.Option("--sequence-length", min=2, help="Tokens in a window.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


_REPORT: Final = "please report it, with the traceback that --debug shows"


def main() -> None:
    """The ``graphq`` command."""
    app()


def _one_line_errors(command: Callable[P, T]) -> Callable[P, T]:
    """``command`` with its exceptions turned into lines on the standard error and an exit status."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return command(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
            raise  # typer's own
        except KeyboardInterrupt:
            _fail("interrupted", 130)
        except Exception as error:
            if kwargs.get("debug"):
                raise
            _fail(_in_words(error))

    return run


def _in_words(error: Exception) -> str:
    match error:
        case PassError():
            return f"internal error: {error}; {_REPORT}"
        case GraphqError():
            return str(error)
        case OSError(filename=str() | bytes() | Path()):
            return f"{error.filename}: {error.strerror}"
        case _:
            first = (str(error).strip().splitlines() or [""])[0]
            return f"internal error: {type(error).__name__}: {first}; {_REPORT}"


def _fail(text: str, status: int = 1) -> NoReturn:
    typer.echo(text, err=True)
    raise typer.Exit(status)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"graphq {version('graphq')}")
        except PackageNotFoundError:  # run from its sources
            typer.echo("graphq, not installed")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


@app.command(name="compile")
@_one_line_errors
def compile_(
    model: Model,
    spec: SpecFile,
    target: Annotated[Literal["torch", "onnx"], typer.Option(help="What to write.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where to write the artifact, a directory.")],
    calibration: Calibration = None,
    samples: Samples = 128,
    sequence_length: Length = 256,
    algorithm: Annotated[
        Literal["rtn"] | None, typer.Option(help="rtn: round to nearest, whatever algorithm the spec names.")
    ] = None,
    dialect: Dialect = None,
    seed: Annotated[int, typer.Option(help="The seed of what an algorithm draws.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an artifact that stands in DIR.")] = False,
    as_json: Json = False,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="ONNX without the key/value cache.")] = False,
    debug: Debug = False,
) -> None:
    """Quantize a model and write the artifact."""
    if no_cache and target != "onnx":
        raise typer.BadParameter("only --target onnx can leave the cache out", param_hint="--no-cache")
    from graphq.files import check_place

    check_place(out, overwrite, [model, spec, *([calibration] if calibration else [])])
    from graphq import compiler
    from graphq.frontends import load_spec

    parsed = load_spec(spec, dialect)
    batches = None if calibration is None else _calibration(model, calibration, samples, sequence_length)
    made = compiler.compile(model, parsed, calibration=batches, algorithm=algorithm, seed=seed)
    options: dict[str, Any] = {"cache": False} if no_cache else {}
    made.emit(target, out, overwrite=overwrite, **options)
    _print_report(made.report, as_json)
    quantized = sum(layer.weight is not None or layer.input is not None for layer in made.report.layers)
    typer.echo(f"{out}: {target} artifact, {quantized} of {len(made.report.layers)} layers quantized", err=True)


@app.command()
@_one_line_errors
def explain(model: Model, spec: SpecFile, as_json: Json = False, dialect: Dialect = None, debug: Debug = False) -> None:
    """Show each layer's plan and the rule that decides. Reads the model's configuration, not its weights."""
    from graphq.compiler import explain

    _print_report(explain(model, spec, dialect=dialect), as_json)


@app.command()
@_one_line_errors
def dump(
    model: Model,
    spec: SpecFile,
    after: Annotated[
        str | None, typer.Option(metavar="PASS", help="Stop after this pass, such as annotate; default: the last.")
    ] = None,
    calibration: Calibration = None,
    samples: Samples = 128,
    sequence_length: Length = 256,
    dialect: Dialect = None,
    debug: Debug = False,
) -> None:
    """Print the graph, one line a node. Reads weights only where a pass needs them."""
    from graphq.compiler import graph_after
    from graphq.text import dump

    batches = None if calibration is None else _calibration(model, calibration, samples, sequence_length)
    typer.echo(dump(graph_after(model, spec, after, calibration=batches, dialect=dialect)), nl=False)


@app.command(name="eval")
@_one_line_errors
def eval_(
    model: Annotated[Path, typer.Argument(metavar="MODEL_DIR_OR_ARTIFACT", help="A model directory or an artifact.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Text, repeatable; default: modules of Python's standard library."),
    ] = None,
    windows: Annotated[
        int | None, typer.Option(min=1, help="Windows of text; default: 320, or all of the given text.")
    ] = None,
    sequence_length: Length = 256,
    debug: Debug = False,
) -> None:
    """Measure the perplexity of a causal language model: lower is better."""
    from graphq import evaluate

    call = _language_model(model)
    tokenizer = evaluate.load_tokenizer(model)
    if text:
        read = _windows(tokenizer, text, sequence_length, windows)
    else:
        read = evaluate.standard_library_windows(tokenizer, count=windows or 320, length=sequence_length)
    _check_fit(model, read)
    found = evaluate.perplexity(call, read)
    typer.echo(f"perplexity {found:.4f} ({len(read)} windows of {sequence_length} tokens)")


@app.command()
@_one_line_errors
def verify(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A directory that graphq compile wrote.")],
    against: Annotated[
        Path | None, typer.Option(metavar="MODEL_DIR", help="Compile this model anew and compare the weights with it.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Compare an artifact's integers, scales and files, bit for bit, with what was compiled. Exit 1 on a difference."""
    from graphq.lowering.verify import verify

    found = verify(artifact, against)
    for line in (*found.differences, *(f"note: {note}" for note in found.notes)):
        typer.echo(line)
    if not found.ok:
        _fail(f"{artifact}: {len(found.differences)} differences from what was compiled")
    typer.echo(f"{artifact}: {found.compared} tensors of codes, scales and zero points are as they were compiled")


def _print_report(report: "Report", as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=1, allow_nan=False))
        for note in report.notes:
            typer.echo(f"note: {note}", err=True)
    elif sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        header, *rows = report.table()
        table = Table(*header, box=None, header_style="bold")
        for row in rows:
            table.add_row(*map(Text, row))
        console = Console()
        console.print(table)
        for note in report.notes:
            console.print(Text(f"note: {note}"))
    else:
        typer.echo(str(report))


def _calibration(model: Path, place: Path, samples: int, length: int) -> "Sequence[Tensor]":
    """The windows of the text in a file or directory, a batch each."""
    from graphq.evaluate import load_tokenizer

    files = [place]
    if place.is_dir():
        files = sorted(file for file in place.iterdir() if file.is_file() and not file.name.startswith("."))
        if not files:
            raise SpecError(f"{place}: holds no files to calibrate on")
    windows = _windows(load_tokenizer(model), files, length, samples)
    _check_fit(model, windows)
    return windows.split(1)


def _windows(tokenizer: "Tokenizer", files: Sequence[Path], length: int, most: int | None) -> "Tensor":
    """The windows of the files' text, ``most`` of them if it holds as many. Raises ``SpecError`` if it fills none."""
    from graphq.evaluate import text_windows

    texts: list[str] = []
    held = 0
    for file in files:
        texts.append(_read_text(file))
        held += len(tokenizer.encode(texts[-1]))
        if most is not None and held >= most * length:
            break
    if held < length:
        raise SpecError(f"{', '.join(map(str, files))}: {held} tokens do not fill a window of {length}")
    return text_windows(tokenizer, texts, length)[:most]


def _check_fit(model: Path, windows: "Tensor") -> None:
    """Raises ``SpecError`` for windows that are longer, or hold other tokens, than the model's configuration says."""
    try:
        config: Any = json.loads((model / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # whoever reads the model says so
    longest, words = (config.get(key) for key in ("max_position_embeddings", "vocab_size"))
    if isinstance(longest, int) and windows.shape[1] > longest:
        raise SpecError(f"{model}: a window of {windows.shape[1]} tokens is longer than the {longest} that it reads")
    if isinstance(words, int) and int(windows.max()) >= words:
        raise SpecError(f"{model}: the tokenizer gives token {int(windows.max())}, the model knows {words}")


def _read_text(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SpecError(f"{file}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise SpecError(f"{file}: {error.strerror}") from error
    if not text.strip():
        raise SpecError(f"{file}: empty")
    return text


def _language_model(path: Path) -> Callable[..., Any]:
    """The causal language model in a model directory or an artifact. Raises ``GraphError`` for another model."""
    from graphq.lowering import manifest

    if not (path / manifest.NAME).is_file():
        from graphq.hugging_face import is_causal_lm, load_model

        loaded = load_model(path)
        if not is_causal_lm(loaded):
            raise GraphError(f"{path}: {type(loaded).__name__} is not a causal language model; it has no perplexity")
        return loaded
    described = manifest.read(path)
    source = manifest.source_of_artifact(path, described)
    if not source.is_causal_lm:
        raise GraphError(f"{path}: not a causal language model; it has no perplexity")
    if described.get("target") == "onnx":
        from graphq.lowering.onnx_tensors import NAME
        from graphq.runtime.onnx_session import OnnxSession

        return OnnxSession(path / NAME, source)
    from graphq.lowering.torch_module import load

    return load(path)
