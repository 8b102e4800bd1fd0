"""``compile``, ``explain`` and ``dump``: what is done with a model directory and a spec."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from graphq.cli.arguments import (
    Calibration,
    CalibrationField,
    Debug,
    Dialect,
    ExampleInputs,
    Fallback,
    ForConsumer,
    Json,
    Model,
    NamedModel,
    Option,
    OptionalSpec,
    Profile,
    Samples,
    Shuffle,
    SpecFile,
    SpecLength,
    TrustRemoteCode,
    Windows,
)
from graphq.cli.errors import one_line_errors
from graphq.cli.printing import print_report
from graphq.cli.progress import shown_progress
from graphq.data.model_text import calibration_batches

if TYPE_CHECKING:
    from torch import Tensor

    from graphq.spec.rules import Run


@one_line_errors
def compile_(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where to write the artifact, a directory.")],
    spec: OptionalSpec = None,
    profile: Profile = None,
    fallback: Fallback = None,
    model: NamedModel = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What to write, torch or onnx or compressed-tensors or ascend; default: what the spec names.",
        ),
    ] = None,
    option: Option = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=SIZE", help="A dimension of one size in the artifact, repeatable, such as batch=1 (onnx)."
        ),
    ] = None,
    consumer: ForConsumer = None,
    calibration: Calibration = None,
    calibration_field: CalibrationField = None,
    windows: Windows = "packed",
    shuffle: Shuffle = None,
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
    inputs: ExampleInputs = None,
    no_check_capture: Annotated[
        bool, typer.Option("--no-check-capture", help="Do not run the captured graph beside the model.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="What a model held whole may take, such as 8GiB; default: what is free."),
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Do not go on with an interrupted compile to DIR, but start anew.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Quantize a model and write the artifact. One that was interrupted is continued by the same command."""
    from graphq.files import check_place
    from graphq.frontends import load_spec
    from graphq.lowering.targets import TARGETS, read_options
    from graphq.spec.fallback import parse_fallback
    from graphq.spec.rules import Run

    if target is not None and target not in TARGETS:
        raise typer.BadParameter(f"{target} is not one of {', '.join(TARGETS)}", param_hint="--target")
    if spec is None and profile is None:
        raise typer.BadParameter("none is given, and no --profile", param_hint="--spec")
    parsed = None if spec is None else load_spec(spec, dialect)
    run = Run() if parsed is None else parsed.run
    model = model_directory(model, run)
    target_name = target or run.target
    if not target_name:
        names = " or ".join(TARGETS)
        raise typer.BadParameter(f"the spec names no target: say --target {names}", param_hint="--target")
    shapes = [f"shapes={','.join(shape)}"] if shape else []
    flags = ["overwrite=true"] * overwrite + ["cache=false"] * no_cache + shapes
    flags += [f"consumer={consumer}"] if consumer else []
    options = read_options(target_name, [*flags, *(option or [])])
    calibration = calibration or (Path(run.calibration) if run.calibration else None)
    specs = [Path(spec)] if spec is not None and Path(spec).exists() else []
    read = [model, *specs, *filter(None, [calibration, inputs])]
    check_place(out, options.get("overwrite") is True, read)
    from graphq import compiler
    from graphq.artifacts.work_folder import discard, told_how_to_go_on, work_folder

    batches = calibration_text(model, calibration, samples, sequence_length, run, calibration_field, windows, shuffle)
    sizes = options.get("shapes")
    # Calibration reads a window at a time, so that a batch of one can be fixed from the start; some take no other.
    fixed = {"batch": 1} if isinstance(sizes, Mapping) and cast(Mapping[str, int], sizes).get("batch") == 1 else None
    work = work_folder(out)
    if restart:
        discard(work)
    with shown_progress(as_json), told_how_to_go_on(work):
        made = compiler.compile(
            model,
            parsed,
            profile=profile,
            fallback=parse_fallback(fallback or ()),
            target=target_name,
            target_options=options,
            calibration=batches,
            algorithm=algorithm,
            seed=seed,
            shapes=fixed,
            inputs=example_inputs(inputs),
            check_capture=not no_check_capture,
            trust_remote_code=trust_remote_code,
            memory=memory,
            scratch_dir=next(parent for parent in out.absolute().parents if parent.exists()),
            work_dir=work,
        )
        try:
            made.emit(target_name, out, **options)
        except BaseException:
            made.release()
            raise
    print_report(made.report, as_json)
    made.release()
    for line in made.report.phase_lines():
        typer.echo(line, err=True)
    quantized = sum(layer.weight is not None or layer.input is not None for layer in made.report.layers)
    typer.echo(f"{out}: {target_name} artifact, {quantized} of {len(made.report.layers)} layers quantized", err=True)


@one_line_errors
def explain(
    spec: SpecFile,
    model: NamedModel = None,
    diff: Annotated[
        str | None, typer.Option(metavar="FILE|PRESET", help="Show what would change with this other spec instead.")
    ] = None,
    profile: Profile = None,
    target: Annotated[
        str | None, typer.Option(metavar="NAME", help="Say what this target, such as ascend, cannot hold.")
    ] = None,
    option: Option = None,
    consumer: ForConsumer = None,
    as_json: Json = False,
    dialect: Dialect = None,
    inputs: ExampleInputs = None,
    trust_remote_code: TrustRemoteCode = False,
    debug: Debug = False,
) -> None:
    """Show each layer's plan and the rule that decides. Reads the model's configuration, not its weights."""
    from graphq.frontends import load_spec

    parsed = load_spec(spec, dialect)
    other = None if diff is None else load_spec(diff)
    model = model_directory(model, parsed.run)
    from graphq.explanation import compare, explain
    from graphq.lowering.targets import TARGETS

    given, trust = example_inputs(inputs), trust_remote_code
    if other is None:
        # A target that graphq lacks is refused where it would be written.
        target = target or (parsed.run.target if parsed.run.target in TARGETS else None)
        options = _target_options(target, consumer, option)
        found = explain(
            model,
            parsed,
            profile=profile,
            target=target,
            target_options=options,
            inputs=given,
            trust_remote_code=trust,
        )
        print_report(found, as_json)
        return
    if target or consumer or option:
        raise typer.BadParameter("is for one spec; leave it out, or --diff", param_hint="--target")
    changed = compare(model, parsed, other, inputs=given, trust_remote_code=trust)
    typer.echo(json.dumps(changed.to_json(), indent=1) if as_json else str(changed))


@one_line_errors
def dump(
    model: Model,
    spec: SpecFile,
    after: Annotated[
        str | None, typer.Option(metavar="PASS", help="Stop after this pass, such as annotate; default: the last.")
    ] = None,
    calibration: Calibration = None,
    calibration_field: CalibrationField = None,
    samples: Samples = None,
    sequence_length: SpecLength = None,
    dialect: Dialect = None,
    debug: Debug = False,
) -> None:
    """Print the graph, one line a node. Reads weights only where a pass needs them."""
    from graphq.explanation import graph_after
    from graphq.frontends import load_spec
    from graphq.ir.text import dump

    parsed = load_spec(spec, dialect)
    batches = calibration_text(model, calibration, samples, sequence_length, parsed.run, calibration_field)
    typer.echo(dump(graph_after(model, parsed, after, calibration=batches)), nl=False)


def _target_options(target: str | None, consumer: str | None, option: list[str] | None) -> dict[str, object]:
    """The options of a target that were given. Those of none are an error."""
    from graphq.lowering.targets import read_options

    given = [*([f"consumer={consumer}"] if consumer else []), *(option or [])]
    if target is None and given:
        raise typer.BadParameter("is of a target: say --target", param_hint="--option" if option else "--for")
    return {} if target is None else read_options(target, given)


def example_inputs(file: Path | None) -> "dict[str, Tensor] | None":
    """The tensors of a safetensors file by name, which are those of arguments of the model's ``forward``."""
    if file is None:
        return None
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise typer.BadParameter(f"{file}: no safetensors file: {error}", param_hint="--inputs") from None


def model_directory(given: Path | None, run: "Run") -> Path:
    """The directory that was given, or else the one that the spec names."""
    if given is None and not run.model:
        raise typer.BadParameter("none is given, and the spec names none", param_hint="MODEL_DIR")
    return given or Path(run.model)


def calibration_text(
    model: Path,
    place: Path | None,
    samples: int | None,
    length: int | None,
    run: "Run",
    field: str | None = None,
    windows: Literal["packed", "padded"] = "packed",
    shuffle: int | None = None,
) -> "Sequence[Tensor] | Sequence[Mapping[str, Tensor]] | None":
    """Batches of the text or records at ``place``, as many and as long as was given, or else as the spec says."""
    if place is None:
        for option, value in (("--calibration-field", field), ("--shuffle", shuffle), ("--windows", windows)):
            if value not in (None, "packed"):
                raise typer.BadParameter("is of records, and no --calibration is given", param_hint=option)
        return None
    samples, length = samples or run.samples or 128, length or run.sequence_length or 256
    return calibration_batches(model, place, samples, length, field, windows, shuffle)
