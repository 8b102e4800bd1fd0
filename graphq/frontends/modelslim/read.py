"""Reading an msModelSlim config, or the description of a checkpoint."""

from typing import Final

from graphq.frontends.document import Document, Section, nearest, show
from graphq.frontends.modelslim.description import parse_description
from graphq.frontends.modelslim.description import recognises as is_description
from graphq.frontends.modelslim.process import read_process
from graphq.spec.rules import Order, Run, Spec

SIGN: Final = "a top-level apiversion, model_quant_type, or <layer>.weight with a type such as W8A8"
VERSIONS: Final = ("modelslim_v1",)
RUNNERS: Final[dict[str, Order]] = {
    "auto": "sequential",
    "layer_wise": "sequential",
    "dp_layer_wise": "sequential",
    "model_wise": "independent",
}
SAVERS: Final = {"ascendv1_saver": "ascend", "compressed_tensors": "compressed-tensors"}
_OTHERS: Final = {
    "modelslim_v0": "the options of its Python scripts are not read; write modelslim_v1",
    "multimodal_vlm_modelslim_v1": "configs of multimodal models are not read; write modelslim_v1",
    "multimodal_sd_modelslim_v1": "configs of diffusion models are not read; write modelslim_v1",
    "modelslim_convert": "conversion of checkpoints is not supported; write modelslim_v1",
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
    spec.only(("runner", "prior", "process", "dataset", "save"))
    if spec.values.get("prior") not in (None, []):
        spec.report("stages before are not supported; put quarot first in process", "prior")
    runner = spec.text("runner") or "auto"
    if runner not in RUNNERS:
        spec.report(f"{show(runner)} is not one of {', '.join(RUNNERS)}{nearest(runner, RUNNERS)}", "runner")
    processed = read_process(spec)
    run = _read_run(spec)
    document.finish()
    return Spec(
        processed.rules,
        processed.algorithms,
        processed.cache,
        RUNNERS[runner],
        run=run,
        dialect="modelslim",
        notes=tuple(document.notes),
    )


def _read_run(spec: Section) -> Run:
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
            section.report(f"{show(kind)} is not supported; graphq writes as {' and '.join(SAVERS)}", "type")
    if len(set(targets)) > 1:
        spec.report("a run writes one target; leave one saver", "save")
    return Run(target=targets[0] if targets else "", calibration=spec.text("dataset") or "")
