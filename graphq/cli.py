"""The command line: ``compile``, ``explain``, ``spec``, ``dump``, ``eval`` and ``verify``.

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

from graphq.data.model_text import calibration_batches, check_fit, file_windows
from graphq.errors import GraphError, GraphqError, PassError

if TYPE_CHECKING:
    from torch import Tensor

    from graphq.report import Report
    from graphq.spec.match import Layer
    from graphq.spec.rules import Run

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
NamedModel = Annotated[
    Path | None,
    typer.Argument(metavar="[MODEL_DIR]", help="A Hugging Face model directory; default: the one that the spec names."),
]
SpecFile = Annotated[
    str,
    typer.Option("--spec", metavar="FILE|PRESET", help="A file in any dialect, or a preset such as w4a16."),
]
Dialect = Annotated[str | None, typer.Option(help="The spec's dialect, where it cannot be recognised, such as llmc.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON: a list with one object for each layer.")]
Calibration = Annotated[
    Path | None, typer.Option(metavar="FILE|DIR", help="Text to calibrate on: a file, or all files in a directory.")
]
Samples = Annotated[
    int | None,
    typer.Option(min=1, help="Windows of text to calibrate on, fewer if the text ends before; default: 128."),
]
Length = Annotated[int, typer.Option("--sequence-length", min=2, help="Tokens in a window.")]
SpecLength = Annotated[
    int | None, typer.Option("--sequence-length", min=2, help="Tokens in a window; default: the spec's, or 256.")
]
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
    spec: SpecFile,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where to write the artifact, a directory.")],
    model: NamedModel = None,
    target: Annotated[
        str | None, typer.Option(metavar="NAME", help="What to write, torch or onnx; default: what the spec names.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="An option of the target, repeatable, such as opset=21 or bfloat16=true."
        ),
    ] = None,
    calibration: Calibration = None,
    samples: Samples = None,
    sequence_length: SpecLength = None,
    algorithm: Annotated[
        Literal["rtn"] | None, typer.Option(help="rtn: round to nearest, whatever algorithm the spec names.")
    ] = None,
    dialect: Dialect = None,
    seed: Annotated[
        int | None, typer.Option(help="The seed of what an algorithm draws; default: the spec's, or 0.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an artifact that stands in DIR.")] = False,
    as_json: Json = False,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="ONNX without the key/value cache.")] = False,
    debug: Debug = False,
) -> None:
    """Quantize a model and write the artifact."""
    from graphq.files import check_place
    from graphq.frontends import load_spec
    from graphq.lowering.targets import TARGETS, read_options

    if target is not None and target not in TARGETS:
        raise typer.BadParameter(f"{target} is not one of {', '.join(TARGETS)}", param_hint="--target")
    parsed = load_spec(spec, dialect)
    run = parsed.run
    model = _model(model, run)
    target_name = target or run.target
    if not target_name:
        names = " or ".join(TARGETS)
        raise typer.BadParameter(f"the spec names no target: say --target {names}", param_hint="--target")
    options = read_options(target_name, [*["overwrite=true"] * overwrite, *["cache=false"] * no_cache, *(option or [])])
    calibration = calibration or (Path(run.calibration) if run.calibration else None)
    read = [model, *([Path(spec)] if Path(spec).exists() else []), *filter(None, [calibration])]
    check_place(out, options.get("overwrite") is True, read)
    from graphq import compiler

    batches = _calibration(model, calibration, samples, sequence_length, run)
    made = compiler.compile(model, parsed, calibration=batches, algorithm=algorithm, seed=seed)
    made.emit(target_name, out, **options)
    _print_report(made.report, as_json)
    quantized = sum(layer.weight is not None or layer.input is not None for layer in made.report.layers)
    typer.echo(f"{out}: {target_name} artifact, {quantized} of {len(made.report.layers)} layers quantized", err=True)


@app.command()
@_one_line_errors
def explain(
    spec: SpecFile,
    model: NamedModel = None,
    diff: Annotated[
        str | None, typer.Option(metavar="FILE|PRESET", help="Show what would change with this other spec instead.")
    ] = None,
    as_json: Json = False,
    dialect: Dialect = None,
    debug: Debug = False,
) -> None:
    """Show each layer's plan and the rule that decides. Reads the model's configuration, not its weights."""
    from graphq.frontends import load_spec

    parsed = load_spec(spec, dialect)
    other = None if diff is None else load_spec(diff)
    model = _model(model, parsed.run)
    from graphq.compiler import compare, explain

    if other is None:
        _print_report(explain(model, parsed), as_json)
        return
    changed = compare(model, parsed, other)
    typer.echo(json.dumps(changed.to_json(), indent=1) if as_json else str(changed))


spec_app: Final = typer.Typer(help="Read and write specs.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(spec_app, name="spec")


@spec_app.command()
@_one_line_errors
def convert(
    spec: Annotated[str, typer.Argument(metavar="FILE|PRESET", help="A spec, in any dialect, or a preset.")],
    to: Annotated[str, typer.Option(metavar="DIALECT", help="The dialect to write, such as llmc.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write it; default: the standard output.")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(metavar="MODEL_DIR", help="Where the rules cannot be said, name the layers of this model."),
    ] = None,
    adapt: Annotated[
        bool, typer.Option("--adapt", help="Round as the other tool does, with its options; a note tells each change.")
    ] = False,
    dialect: Dialect = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE if it exists.")] = False,
    debug: Debug = False,
) -> None:
    """Write a spec in another dialect. What that dialect cannot hold is an error that names it."""
    from graphq.files import write_text
    from graphq.frontends import convert_spec, load_spec

    parsed = load_spec(spec, dialect)
    found = convert_spec(parsed, to, None if model is None else _layers(model), adapt)
    for note in (*parsed.notes, *found.notes):
        typer.echo(f"note: {note}", err=True)
    if out is None:
        typer.echo(found.text, nl=False)
    else:
        write_text(out, found.text, overwrite)


@spec_app.command()
@_one_line_errors
def presets(debug: Debug = False) -> None:
    """List the presets: name, weight, input."""
    from graphq.frontends.presets import SCHEMES

    for name, (weight, activation) in SCHEMES.items():
        typer.echo(f"{name:12}  {weight:22}  {activation or 'float'}")


@app.command()
@_one_line_errors
def dump(
    model: Model,
    spec: SpecFile,
    after: Annotated[
        str | None, typer.Option(metavar="PASS", help="Stop after this pass, such as annotate; default: the last.")
    ] = None,
    calibration: Calibration = None,
    samples: Samples = None,
    sequence_length: SpecLength = None,
    dialect: Dialect = None,
    debug: Debug = False,
) -> None:
    """Print the graph, one line a node. Reads weights only where a pass needs them."""
    from graphq.compiler import graph_after
    from graphq.frontends import load_spec
    from graphq.ir.text import dump

    parsed = load_spec(spec, dialect)
    batches = _calibration(model, calibration, samples, sequence_length, parsed.run)
    typer.echo(dump(graph_after(model, parsed, after, calibration=batches)), nl=False)


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
    from graphq.data import evaluate

    call = _language_model(model)
    tokenizer = evaluate.load_tokenizer(model)
    if text:
        read = file_windows(tokenizer, text, sequence_length, windows)
    else:
        read = evaluate.standard_library_windows(tokenizer, count=windows or 320, length=sequence_length)
    check_fit(model, read)
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
    from graphq.verifier import verify

    found = verify(artifact, against)
    for line in (*found.differences, *(f"note: {note}" for note in found.notes)):
        typer.echo(line)
    if not found.ok:
        _fail(f"{artifact}: {len(found.differences)} differences from what was compiled")
    typer.echo(f"{artifact}: {found.compared} tensors of codes, scales and zero points are as they were compiled")


def _model(given: Path | None, run: "Run") -> Path:
    """The directory that was given, or else the one that the spec names."""
    if given is None and not run.model:
        raise typer.BadParameter("none is given, and the spec names none", param_hint="MODEL_DIR")
    return given or Path(run.model)


def _layers(model: Path) -> "dict[str, Layer]":
    """The layers of the model in a directory, whose weights are not read."""
    from graphq.compiler import capture
    from graphq.ir.layers import layers

    return layers(capture(model, weights=False))


def _calibration(
    model: Path, place: Path | None, samples: int | None, length: int | None, run: "Run"
) -> "Sequence[Tensor] | None":
    """Batches of the text at ``place``, as many and as long as was given, or else as the spec says."""
    if place is None:
        return None
    return calibration_batches(model, place, samples or run.samples or 128, length or run.sequence_length or 256)


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


def _language_model(path: Path) -> Callable[..., Any]:
    """The causal language model in a model directory or an artifact. Raises ``GraphError`` for another model."""
    from graphq.artifacts import manifest

    if not (path / manifest.NAME).is_file():
        from graphq.capture.hugging_face import is_causal_lm, load_model

        loaded = load_model(path)
        if not is_causal_lm(loaded):
            raise GraphError(f"{path}: {type(loaded).__name__} is not a causal language model; it has no perplexity")
        return loaded
    described = manifest.read(path)
    source = manifest.source_of_artifact(path, described)
    if not source.is_causal_lm:
        raise GraphError(f"{path}: not a causal language model; it has no perplexity")
    from graphq.lowering.targets import target_named

    return target_named(str(described.get("target"))).open(path, source)
