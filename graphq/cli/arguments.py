"""The arguments and options that several commands take."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Model = Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="A Hugging Face model directory.")]
NamedModel = Annotated[
    Path | None,
    typer.Argument(metavar="[MODEL_DIR]", help="A Hugging Face model directory; default: the one that the spec names."),
]
SpecFile = Annotated[
    str,
    typer.Option("--spec", metavar="FILE|PRESET", help="A file in any dialect, or a preset such as w4a16."),
]
OptionalSpec = Annotated[
    str | None,
    typer.Option("--spec", metavar="FILE|PRESET", help="As for explain; may be left out where a --profile is given."),
]
Profile = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="What the artifact is for, such as ort-cpu, openvino, qnn-htp or torch-cpu."),
]
Fallback = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE", help="Ops to take out of 8 bits, repeatable: max_ops=3 of them, or until min_sqnr=30 dB."
    ),
]
Dialect = Annotated[str | None, typer.Option(help="The spec's dialect, where it cannot be recognised, such as llmc.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON: the layers, and the ops between them.")]
Calibration = Annotated[
    Path | None, typer.Option(metavar="FILE|DIR", help="Text to calibrate on, or records: a file or a directory.")
]
CalibrationField = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="The field of JSON lines or parquet that holds the text, or messages; default: the one of those names.",
    ),
]
Windows = Annotated[
    Literal["packed", "padded"],
    typer.Option(help="Of records: windows full of one after the other, or one for each, padded and masked."),
]
Shuffle = Annotated[int | None, typer.Option(metavar="SEED", help="Take records in an order that this seed draws.")]
Samples = Annotated[
    int | None,
    typer.Option(min=1, help="Windows of text to calibrate on, fewer if the text ends before; default: 128."),
]
Length = Annotated[int, typer.Option("--sequence-length", min=2, help="Tokens in a window.")]
SpecLength = Annotated[
    int | None, typer.Option("--sequence-length", min=2, help="Tokens in a window; default: the spec's, or 256.")
]
ExampleInputs = Annotated[
    Path | None,
    typer.Option(
        "--inputs",
        metavar="FILE",
        help="A safetensors file with example inputs by argument name, for models whose inputs their configuration does"
        " not tell.",
    ),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that the model directory brings along.")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Option = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="An option of the target, repeatable, such as opset=21 or bfloat16=true."),
]
ForConsumer = Annotated[
    Literal["vllm", "transformers", "vllm-ascend", "any"] | None,
    typer.Option("--for", help="What is to load a checkpoint; default: vllm, of ascend vllm-ascend."),
]
