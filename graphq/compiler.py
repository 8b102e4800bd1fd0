"""``graphq.compile``: the pipeline from a model and a spec to the QDQ form."""

import dataclasses
import math
import os
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, cast

import torch
from torch import Tensor, fx, nn

from graphq.algorithms import PassContext, columns_in_order, unmatched
from graphq.artifacts.inputs import inputs_of
from graphq.artifacts.journal import Journal, kept
from graphq.artifacts.scratch import SCRATCH, give_scratch
from graphq.capture import hugging_face
from graphq.capture.adapters import without_adapters
from graphq.capture.given_inputs import capture_directory_on
from graphq.capture.modules import capture_module, unwrapped
from graphq.capture.source import KEY, record_stored, source_of, stored_dtype
from graphq.capture.unread import capture_unread, read_all
from graphq.checks import (
    asks_for_nothing,
    check_calibration,
    check_tensors,
    none_quantized,
    refusals,
    why_whole,
)
from graphq.compiled import Compiled
from graphq.data.batches import complete_all, first_batches, with_progress
from graphq.errors import GraphError, SpecError
from graphq.frontends import load_spec
from graphq.ir.cache_plans import notes_of, plan_caches, problems_of
from graphq.ir.choices import CHOICES
from graphq.ir.layers import sites
from graphq.ir.parts import cut
from graphq.ir.pipeline import Batches, Pipeline
from graphq.ir.unnamed import unnamed
from graphq.lowering.checkpoints.sources.read import is_quantized, quantized_source
from graphq.lowering.profiles import default_spec, for_its_profile, profile_named
from graphq.lowering.targets import prepared, target_named
from graphq.memory import bytes_of, check_directory, check_disk
from graphq.passes.annotate import decide
from graphq.passes.fall_back import reference_outputs
from graphq.phases import PhaseTimer
from graphq.pipelines import (
    attention_problems,
    cache_problems,
    canonical_passes,
    fallback_problems,
    passes_for,
    placed_for,
    unmatched_activations,
    with_steps,
)
from graphq.report import (
    ActivationsReport,
    make_report,
    spec_settings,
)
from graphq.spec.algorithms import ALGORITHMS
from graphq.spec.fallback import Fallback, fallback_of
from graphq.spec.plan import Plan
from graphq.spec.rules import Spec
from graphq.state import copy_tensors, deferred_tensors, storage_of

_CODES: Final = 2  # bytes for each element: its code, and what that is packed into
NOTHING_QUANTIZED: Final = "NOTHING IS QUANTIZED: all rules of the spec keep layers float"
Inputs = Tensor | Sequence[Any] | Mapping[str, Any]  # tensors, and lists, tuples and dicts of them


def capture(
    model: nn.Module | str | os.PathLike[str],
    inputs: Inputs | None = None,
    dtype: torch.dtype | None = None,
    weights: bool = True,
    cache: bool = True,
    mask: str | None = None,
    shapes: Mapping[str, int] | None = None,
    check_capture: bool = True,
    trust_remote_code: bool = False,
) -> fx.GraphModule:
    """The graph of a module (with example ``inputs``), of a transformers model, or of a Hugging Face directory.

    A ``PeftModel`` is taken for the model in it, if that carries no adapters.

    A directory is captured in float32, a module in its own dtype, unless ``dtype`` says otherwise; ``weights=False``
    reads a directory's configuration alone. ``cache=False`` leaves the key/value cache, or another that a model gives
    back, out. ``mask`` names the one of ``inputs`` that is 0 where a token is padding; of other models it is known.
    ``shapes`` fixes dimensions by name, such as ``{"batch": 1}``.
    ``check_capture``: where weights are held, the graph is run beside the model at two sets of sizes, and is refused
    where it gives something else. ``trust_remote_code``: code that a directory brings along may run.
    Without ``dtype``, what stays float of a 16-bit directory is stored in its own dtype.
    """
    whole = "a graph with weights was asked for"
    return _captured(model, inputs, dtype, weights, cache, mask, shapes, whole, None, check_capture, trust_remote_code)


def _captured(
    model: nn.Module | str | os.PathLike[str],
    inputs: Inputs | None,
    dtype: torch.dtype | None,
    weights: bool,
    cache: bool,
    mask: str | None,
    shapes: Mapping[str, int] | None,
    whole: str = "",
    memory: int | None = None,
    check: bool = False,
    trust: bool = False,
) -> fx.GraphModule:
    """``capture``; matrices of a directory stay in their files if there is no reason ``whole`` to load it. One that has
    to be loaded, and takes more than ``memory`` then, is a ``SpecError``.
    """
    if dtype is not None and not (isinstance(cast(object, dtype), torch.dtype) and dtype.is_floating_point):
        raise SpecError(f"dtype: {dtype!r} is not a floating-point dtype of torch, such as torch.bfloat16")
    is_directory = isinstance(model, str | os.PathLike)
    if is_directory:
        path, held = Path(model), dtype or torch.float32
        quantized = quantized_source(path)
        given = "example inputs or code of the directory's own are given"

        def own(*arguments: Any) -> fx.GraphModule | None:
            found = None if whole else capture_unread(*arguments)
            if found is None:
                check_directory(path, held.itemsize, whole or f"{path}: transformers has to load it", memory)
            return found

        unread = own if quantized is None else partial(capture_unread, quantized=quantized.tensors)

        if inputs is not None or trust:
            if quantized is not None:
                raise GraphError(f"{path}: {given}, and its weights are quantized ({quantized.format}): leave them out")
            if weights:
                check_directory(path, held.itemsize, given, memory)
        if inputs is not None:
            gm = capture_directory_on(path, inputs, held, weights, cache, mask, shapes, check, trust)
        else:
            is_coded = quantized is not None
            gm = hugging_face.capture_directory(path, held, weights, cache, shapes, unread, check, trust, is_coded)
        if quantized is not None and weights and whole:
            check_directory(path, held.itemsize, whole, memory, quantized.elements)
            with torch.no_grad():
                read_all(gm)
        if quantized is not None:
            source = source_of(gm)
            gm.meta[KEY] = dataclasses.replace(source, dtype=quantized.dtype, notes=(*source.notes, quantized.note))
    elif not isinstance(cast(object, model), nn.Module):
        raise GraphError(f"model: a {type(model).__name__} is neither a module nor the path of a model directory")
    else:
        model = without_adapters(unwrapped(model))
        if dtype is not None and any(p.dtype != dtype for p in model.parameters() if p.is_floating_point()):
            import copy

            model = copy.deepcopy(model).to(dtype)
        if inputs is not None:
            gm = capture_module(model, inputs, cache, mask, shapes, check)
        elif hugging_face.is_pretrained(model):
            gm = hugging_face.capture_pretrained(cast(Any, model), cache, shapes, check)
        else:
            raise GraphError(
                f"inputs: {type(model).__name__} is not a transformers model; pass example inputs of its forward"
            )
    found = source_of(gm).mask
    if mask is not None and mask != found:
        raise SpecError(f"mask: {mask}: " + (f"this model's mask is {found}" if found else "this model takes no mask"))
    Pipeline(canonical_passes()).run(gm)
    if is_directory and dtype is None:
        record_stored(gm)
    return gm


def compile(  # noqa: A001
    model: nn.Module | str | os.PathLike[str],
    spec: Spec | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    *,
    profile: str | None = None,
    fallback: Fallback | Mapping[str, Any] | None = None,
    target: str | None = None,
    target_options: Mapping[str, Any] | None = None,
    inputs: Inputs | None = None,
    calibration: Iterable[object] | None = None,
    algorithm: str | None = None,
    dtype: torch.dtype | None = None,
    consume: bool = False,
    seed: int | None = None,
    dialect: str | None = None,
    cache: bool = True,
    mask: str | None = None,
    shapes: Mapping[str, int] | None = None,
    check_capture: bool = True,
    trust_remote_code: bool = False,
    matmul_precision: Literal["highest", "medium"] = "highest",
    memory: int | str | None = None,
    scratch_dir: str | os.PathLike[str] | None = None,
    work_dir: str | os.PathLike[str] | None = None,
) -> Compiled:
    """Compile ``model`` as ``spec`` says.

    model: a module (with example ``inputs``: a tensor, a tuple, or a dict by argument name), a transformers model, or
        the path of a Hugging Face directory (captured in float32 unless ``dtype`` says otherwise), with ``inputs`` for
        models whose inputs do not follow from their configuration, such as encoder-decoders.
    spec: a ``Spec``, a dict, a YAML or JSON path, or YAML text, in any dialect, or a preset such as ``w4a16``;
        ``dialect`` names it where it cannot be recognised. With a ``profile`` it may be left out.
    profile: the name of what the artifact is for, such as ``ort-cpu``: quantizers stand where that runs ops in
        integers, over the whole graph where the spec has static activations (``graphq.lowering.profiles``). Without a
        spec, every linear and convolution, and every tensor that it wants so, has the profile's types.
    fallback: how far to take ops out of eight bits, such as ``{"max_ops": 3, "min_sqnr": 30}``, instead of the spec's.
    target: what will be emitted, such as ``compressed-tensors``: scales are those that it stores, and what it cannot
        hold is refused before the work begins. Any other target can be emitted, too. ``target_options``: those of its
        ``emit`` that this depends on, such as ``{"consumer": "transformers"}``.
    calibration: batches (each a tensor, a tuple or a dict) for activations with static scales, and for algorithms. Of
        more batches than the spec asks for, the first are taken.
    mask: which of ``inputs`` is the mask of tokens, ``[batch, tokens]``, 1 where a token counts and 0 where it is
        padding; what is padding in a calibration batch has no part in it. transformers' models say it themselves.
    shapes: the sizes of dimensions that are fixed, such as ``{"batch": 1}``, at those of ``inputs``.
    check_capture: run the captured graph beside the model before anything is quantized, on a few tokens or the
        examples and at a second length, and refuse it where it gives something else.
    trust_remote_code: run code that a directory brings along (``auto_map`` in its configuration).
    algorithm: ``"rtn"`` rounds to nearest whatever algorithm the spec names.
    matmul_precision: how float32 products are computed in calibration, as ``torch.set_float32_matmul_precision`` takes
        it: ``medium`` rounds their factors to bfloat16, which is several times faster on processors with units for it.
    seed: of what an algorithm draws; by default the spec's, or 0.
    memory: bytes, or a size such as ``8GiB``: a directory that has to be held whole and does not fit is refused; by
        default what is free. ``scratch_dir``: where what became of blocks waits for being written; by default the
        system's place for temporary files. ``work_dir``: a folder in which what is finished of a checkpoint that is
        compiled by blocks outlives the process; the same compile goes on from there, and ``SpecError`` says what
        changed if it is not the same. It is gone when ``emit`` is done and the result is no longer used.
    consume: take the caller's tensors instead of copying those that stay float; the model is unusable afterwards.

    The caller's model is never changed unless ``consume`` is true. Raises ``SpecError``, ``GraphError`` and
    ``TargetError``.
    """
    timer = PhaseTimer()
    parsed = spec_for(spec, profile, dialect)
    if algorithm is not None:
        if algorithm != "rtn":
            raise SpecError(f"algorithm: {algorithm!r} is not rtn; other algorithms stand in the spec")
        parsed = dataclasses.replace(parsed, algorithms=())
    if fallback is not None:
        parsed = dataclasses.replace(parsed, fallback=fallback_of(fallback))
    seed = (parsed.run.seed or 0) if seed is None else seed
    if not isinstance(cast(object, seed), int) or not -(1 << 63) <= seed < 1 << 64:
        raise SpecError(f"seed: {seed} is not an integer from -2^63 to 2^64 - 1")
    if matmul_precision not in ("highest", "medium"):
        raise SpecError(f"matmul_precision: {matmul_precision!r} is neither highest nor medium")
    limit = None if memory is None else bytes_of(memory)
    if problems := [*refusals(parsed), *fallback_problems(parsed), *cache_problems(parsed)]:
        raise SpecError(problems)
    reads = target is not None and target_named(target).reads
    whole = why_whole(parsed, calibration is not None, reads)
    gm = _captured(model, inputs, dtype, True, cache, mask, shapes, whole, limit, check_capture, trust_remote_code)
    is_kept = work_dir is not None and reads and isinstance(model, str | os.PathLike) and bool(deferred_tensors(gm))
    if reads and deferred_tensors(gm) and not is_kept:
        give_scratch(gm, scratch_dir)
    if isinstance(model, str | os.PathLike) and deferred_tensors(gm) and (why := _held_later(gm, parsed, reads)):
        elements = None
        if is_quantized(Path(model)):
            elements = sum(tensor.numel() for tensor in gm.state_dict(keep_vars=True).values())
        check_directory(Path(model), (dtype or torch.float32).itemsize if reads else _CODES, why, limit, elements)
    timer.end("capture")
    widths = stored_bits(gm)
    held = gm.state_dict(keep_vars=True).values() if isinstance(model, nn.Module) and not consume else ()
    shared = {storage_of(tensor) for tensor in held}
    gm = with_steps(gm, parsed)
    resolved, notes = decide(gm, parsed)
    found = {fqn: one.layer for fqn, one in resolved.items()}
    problems, kept_nothing = unmatched_activations(gm, parsed)
    others = unnamed(gm)
    cached = plan_caches(gm, parsed.cache)
    attention_lacks, attention_notes = attention_problems(gm, parsed)
    problems += [*problems_of(cached, parsed.cache), *attention_lacks, *unmatched(parsed, found, modules_of(gm))]
    if problems or (problems := none_quantized(parsed, resolved, others)):
        raise SpecError(problems)
    check_calibration(parsed, resolved, calibration)
    check_tensors(gm, resolved, first=calibration is not None)
    if target is not None:
        prepared(gm, target, resolved, parsed, **(target_options or {}))
    place = work_dir if is_kept else gm.meta.get(SCRATCH)
    if place is not None and calibration is not None:
        planned = (one.layer.shape for one in resolved.values() if isinstance(one.decision, Plan))
        check_disk(Path(place), sum(map(math.prod, planned)))  # a byte for each code
    if consume and isinstance(model, nn.Module):
        for parameter in model.parameters():  # now that nothing is left to refuse before the work begins
            parameter.data = torch.empty(0, dtype=parameter.dtype)
    source, sqnr = source_of(gm), dict[str, float]()
    placed: list[ActivationsReport] = []
    pass_notes = [NOTHING_QUANTIZED] if asks_for_nothing(parsed) else []
    pass_notes += [*(notes_of(source, cached) if cached else []), *attention_notes]
    with torch.random.fork_rng(devices=[]), torch.no_grad(), _precision(matmul_precision):
        torch.manual_seed(seed)
        batches: Batches | None = None
        if calibration is not None:
            batches = with_progress(first_batches(complete_all(source, calibration), parsed.run), calibration)
        by_blocks = any(ALGORITHMS[a.name].needs_data for a in parsed.algorithms)
        if batches is not None and (by_blocks or placed_for(parsed) is not None):
            batches = list(batches)  # several walks over the blocks, and over the whole graph, read them
        wanted = reference_outputs(gm, batches) if parsed.fallback and batches is not None else None
        chosen: dict[str, Tensor] = {}
        context = PassContext(sqnr.__setitem__, pass_notes.append, seed, placed.append, wanted, chosen)
        timer.end("plan")
        passes = passes_for(parsed, found, context, by_blocks)
        journal = None
        if is_kept:
            given = {"target": target, "target options": target_options or {}, "example inputs": inputs, "seed": seed}
            given |= {"dtype": dtype, "cache": cache, "shapes": shapes or {}, "matmul precision": matmul_precision}
            made_from = inputs_of(Path(cast(Any, model)), parsed, cast(Any, batches), given)
            journal = Journal(Path(cast(Any, work_dir)), made_from, pass_notes, sqnr, chosen)
        with kept(gm, journal):
            Pipeline(passes, after=lambda step, _: timer.end(step.name)).run(gm, batches)
        if not reads:
            read_all(gm)
    gm.meta[CHOICES] = chosen
    copy_tensors(gm, shared)
    all_notes = [*source.notes, *notes, *kept_nothing, *dict.fromkeys(pass_notes)]
    bits, between = source.dtype.itemsize * 8, placed[-1] if placed else None
    in_order = columns_in_order(parsed, found)
    report = make_report(resolved, all_notes, bits, sqnr, spec_settings(parsed), widths, others, between, in_order)
    timer.end("finish")
    unread = sqnr if deferred_tensors(gm) else None
    return Compiled(gm, parsed, dataclasses.replace(report, phases=timer.phases, caches=cached), seed, unread)


def spec_for(
    spec: Spec | Mapping[str, Any] | str | os.PathLike[str] | None, profile: str | None, dialect: str | None
) -> Spec:
    """The spec, for this profile if one is given; without a spec the profile's own."""
    if spec is not None:
        parsed = load_spec(cast(Any, spec), dialect)
        return for_its_profile(parsed if profile is None else dataclasses.replace(parsed, profile=profile))
    if profile is None:
        raise SpecError("spec: none given; give one, or a profile, such as ort-cpu")
    return default_spec(profile_named(profile))


def _held_later(gm: fx.GraphModule, spec: Spec, reads: bool) -> str:
    """Why a model is held whole although its weights are still in their files; nothing where it is not."""
    if not reads:
        return "a target that is no checkpoint is written from a graph in memory"
    if any(ALGORITHMS[a.name].needs_data for a in spec.algorithms) and len(cut(gm)) == 1:
        return "the model has no blocks that stand one after the other"
    return ""


@contextmanager
def _precision(matmul_precision: str) -> Generator[None]:
    """Float32 products are computed so while it lasts."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(matmul_precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def modules_of(gm: fx.GraphModule) -> set[str]:
    """The modules of the source that have tensors of their own."""
    return {name.rpartition(".")[0] for name in gm.state_dict(keep_vars=True)}


def stored_bits(gm: fx.GraphModule) -> dict[str, int]:
    """The width in which the weight of each layer that could be named is stored, should it stay float."""
    source, held = source_of(gm), gm.state_dict(keep_vars=True)
    found: dict[str, int] = {}
    for site in sites(gm):
        dtype = stored_dtype(source, site.param.fqn, held[site.param.fqn])
        found |= dict.fromkeys(site.fqns, dtype.itemsize * 8)
    return found
