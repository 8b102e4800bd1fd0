"""Reading an msModelSlim config, or the description of a checkpoint."""

import dataclasses
from collections.abc import Mapping
from typing import Final

from graphq.frontends.document import Document, Section, nearest, show
from graphq.frontends.modelslim.description import parse_description
from graphq.frontends.modelslim.description import recognises as is_description
from graphq.frontends.modelslim.process import read_process
from graphq.frontends.modelslim.smooth import REFUSED
from graphq.frontends.modelslim.v0 import read_v0
from graphq.spec.rules import Order, Run, Spec

SIGN: Final = "a top-level apiversion, model_quant_type, or <layer>.weight with a type such as W8A8"
V0: Final = "modelslim_v0"
_IMAGES: Final = "multimodal_vlm_modelslim_v1"
_DIFFUSION: Final = "multimodal_sd_modelslim_v1"
VERSIONS: Final = ("modelslim_v1", _IMAGES, _DIFFUSION, V0)
RUNNERS: Final[dict[str, Order]] = {
    "auto": "sequential",
    "layer_wise": "sequential",
    "dp_layer_wise": "sequential",
    "model_wise": "independent",
}
SAVERS: Final = {
    "ascendv1_saver": "ascend",
    "compressed_tensors": "compressed-tensors",
    "mindie_format_saver": "mindie",  # graphq writes none such, which is said where it would be written
}
# What a version has in its spec beside what all have.
_OF_VERSION: Final[Mapping[str, tuple[str, ...]]] = {_IMAGES: (), _DIFFUSION: ("multimodal_sd_config",)}
_UNUSED: Final = {
    "default_text": "it stands beside images that have no text, and graphq reads no images from files",
    "multimodal_sd_config": "it runs the pipeline of a diffusion model; give the model's own inputs",
}
_OTHERS: Final = {
    "modelslim_convert": "checkpoints are not converted tensor by tensor; compile the model with a modelslim_v1 config",
}


def recognises(document: Document) -> bool:
    """Whether the document is in this dialect."""
    return "apiversion" in document.root or is_description(document)


def parse(document: Document) -> Spec:
    """The spec that the config means. Raises ``SpecError`` with everything that is wrong with it."""
    if "apiversion" not in document.root and is_description(document):
        return parse_description(document)
    top = Section(document, document.root)
    version = top.text("apiversion", required=True)
    if version is not None and version not in VERSIONS:
        why = _OTHERS.get(version, f"is not one of {', '.join(VERSIONS)}{nearest(version, VERSIONS)}")
        top.report(f"{show(version)}: {why}", "apiversion")
        document.finish()
    for key in top.values:
        if key == "metadata":
            top.unused(key, "it says what the config was tried with")
        elif key not in ("apiversion", "spec"):  # as documented: a place for anchors
            top.unused(key, f"a key of the file's own{nearest(key, ('metadata', 'spec'))}")
    spec = top.section("spec", required=True)
    if spec is None:
        document.finish()
    assert spec is not None  # else there was a problem
    if version == V0:
        found = read_v0(spec)
        document.finish()
        assert found is not None  # else there was a problem
        return dataclasses.replace(found, dialect="modelslim", notes=tuple(document.notes))
    spec.only(("runner", "prior", "process", "dataset", "save", "default_text", *_OF_VERSION.get(version or "", ())))
    _read_prior(spec)
    runner = spec.text("runner") or "auto"
    if runner not in RUNNERS:
        spec.report(f"{show(runner)} is not one of {', '.join(RUNNERS)}{nearest(runner, RUNNERS)}", "runner")
    processed = read_process(spec)
    run = _read_run(spec, version)
    document.finish()
    return Spec(
        processed.rules,
        processed.algorithms,
        processed.cache,
        RUNNERS[runner],
        run=run,
        attention=processed.attention,
        dialect="modelslim",
        notes=tuple(document.notes),
    )


def _read_prior(spec: Section) -> None:
    """Reports the processors of stages that come before."""
    for index, stage in enumerate(spec.items("prior", " of stages") if spec.values.get("prior") is not None else ()):
        section = Section(spec.document, stage if isinstance(stage, dict) else {}, (*spec.at, "prior", index))
        section.only(("process", "dataset"))
        processors = section.items("process", " of processors", required=True)
        for place, item in enumerate(processors):
            kind = item.get("type") if isinstance(item, dict) else None
            why = REFUSED.get(str(kind), f"stages before are not supported; put {show(kind)} first in spec.process")
            section.report(f"{kind}: {why}" if kind in REFUSED else why, "process", place)
        if not processors:
            section.report("stages before are not supported; leave it out")


def _read_run(spec: Section, version: str | None) -> Run:
    targets: list[str] = []
    for index, item in enumerate(spec.items("save", " of savers") if spec.values.get("save") is not None else ()):
        section = Section(spec.document, item if isinstance(item, dict) else {}, (*spec.at, "save", index))
        section.only(("type", "part_file_size"))
        kind = section.text("type", required=True)
        if "part_file_size" in section.values:
            section.unused("part_file_size", "the target decides")
        if kind in SAVERS:
            targets.append(SAVERS[kind])
        elif kind is not None:
            section.report(
                f"{show(kind)} is not supported; graphq writes as ascendv1_saver and compressed_tensors", "type"
            )
    if len(set(targets)) > 1:
        spec.report("a run writes one target; leave one saver", "save")
    data = spec.text("dataset") or ""
    for key, why in _UNUSED.items():
        if key in spec.values:
            spec.unused(key, why)
    if data and version in _OF_VERSION:
        spec.unused("dataset", "graphq calibrates on text, or on the inputs that it is given")
        data = ""
    return Run(target=targets[0] if targets else "", calibration=data)
