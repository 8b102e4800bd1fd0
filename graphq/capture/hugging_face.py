"""Capture of transformers models, and of the directories they are saved in, with or without weights.

A causal language model becomes ``input_ids, attention_mask, position_ids (where it takes them),
past_key_values.{i}.key, past_key_values.{i}.value`` -> ``logits, present.{i}.key, present.{i}.value``: full-length
caches as flat tensors, positions explicit. Cache objects live in the wrapper that is traced away. Other models are fed
the inputs of their own kind.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from graphq.capture import adapters
from graphq.capture.caches import Caches, caches_of
from graphq.capture.export import MINIMUM, FlatModel, export_flat, lean_export
from graphq.capture.export_errors import SpecializedError
from graphq.capture.language_models import arguments_of, causal_lm, experts_as, is_causal_lm, run_of
from graphq.capture.loops import loop_over_text
from graphq.capture.proof import prove, samples_of
from graphq.capture.quiet import silent_transformers
from graphq.capture.remote_code import class_of_code, has_code
from graphq.capture.rope import frequencies_held, growing_frequencies
from graphq.capture.sizes import MAX_SIZE, fixed_sizes, position_limit
from graphq.capture.source import BATCH, KEY, PAST, SEQUENCE, TOTAL, Source, TensorInput, source_of, with_total
from graphq.capture.text_proof import prove_text
from graphq.capture.weight_files import check_weight_files, first_names
from graphq.errors import GraphError, SpecError
from graphq.files import MANIFEST

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Unread = Callable[[Path, torch.dtype, bool, Mapping[str, int] | None], fx.GraphModule | None]
_QUANTIZATION: Final = "quantization_config"
_BY_PATH: Final = "its codes are read from files alone: give the path of its directory instead of the module"
_BY_OTHERS: Final = (
    "graphq compile, convert, inspect and verify --against read quantized directories; here a float model is needed, or"
    " an artifact that is compiled from this one"
)
_UNTRUSTED: Final = (
    "auto_map names code that the directory brings along, which is run only with trust_remote_code=True"
    " (--trust-remote-code)"
)
# Different sizes of at least 2, so that no two dimensions are taken for one and none for a constant.
_SAMPLE: Final = {BATCH: 2, SEQUENCE: 3, PAST: 5}


def is_pretrained(model: nn.Module) -> bool:
    """Whether ``model`` is a transformers model; does not import transformers."""
    return any(
        c.__module__.startswith("transformers.") and c.__name__ == "PreTrainedModel" for c in type(model).__mro__
    )


def capture_pretrained(
    model: "PreTrainedModel", cache: bool = True, shapes: Mapping[str, int] | None = None, check: bool = False
) -> fx.GraphModule:
    """The graph of a transformers model, with inputs made from its configuration.

    ``cache=False`` leaves the key/value cache out of a causal language model. ``shapes`` fixes dimensions by name.
    ``check``: the graph is run beside the model, and is refused where it gives something else.
    Raises ``SpecError`` for a dimension that there is not, ``GraphError`` for models that are quantized already, of a
    kind whose inputs cannot be made, or with a cache that is not plain keys and values.
    """
    refuse_quantized(model.config)
    given = {} if shapes is None else shapes
    if not is_causal_lm(model):
        flat, inputs = _plain(model)
        return _captured(model, flat, inputs, given, check)
    try:
        caches = caches_of(model, run_of(model))
    except GraphError:
        if cache:
            raise
        return _captured(model, *causal_lm(model, None, False), given, check)
    if SEQUENCE in given or not caches.has_states:
        kept = caches if cache else None
        return _captured(model, *causal_lm(model, kept, given.get(SEQUENCE) == 1), given, check, kept)
    loop = loop_over_text(model, run_of(model))
    if loop is None:
        kept = caches if cache else None
        try:
            return _captured(model, *causal_lm(model, kept, False), given, check, kept)
        except SpecializedError as error:
            if not cache:
                raise
            loop = str(error)
    elif not cache:
        raise GraphError(
            f"{loop}; leave cache=False out for a graph of one token that keeps what the loop does, or declare the"
            ' length of all texts with shapes={"sequence": ...}'
        )
    gm = _captured(model, *causal_lm(model, caches, True), {**given, SEQUENCE: 1}, check, caches)
    notes = (f"texts are read token by token: {loop}", *(prove_text(gm, model, run_of(model)) if check else ()))
    gm.meta[KEY] = replace(source_of(gm), notes=(*source_of(gm).notes, *notes))
    return gm


def _captured(
    model: "PreTrainedModel",
    flat: FlatModel,
    inputs: Sequence[TensorInput],
    shapes: Mapping[str, int],
    check: bool,
    caches: Caches | None = None,
) -> fx.GraphModule:
    longest = position_limit(model)
    limits = {SEQUENCE: longest} if longest is not None and not any(i.is_cache for i in inputs) else {}
    names = sorted({d for i in inputs for d in i.shape if isinstance(d, str) and d != TOTAL})
    ranges = [(name, MINIMUM.get(name, 1), limits.get(name, MAX_SIZE)) for name in names]
    fixed, problems = fixed_sizes(shapes, ranges)
    if problems:
        raise SpecError(problems)
    sizes = with_total({name: fixed.get(name, _SAMPLE[name]) for name in names})
    try:
        with experts_as("grouped_mm", model), frequencies_held(model):
            gm = export_flat(flat, inputs, tuple(_sample(model, i, sizes) for i in inputs), limits, fixed)
    except SpecializedError as error:
        declared = f'{{"{error.dimension}": ...}}' if error.dimension else "..."
        raise SpecializedError(f"{error}; declare its one size with shapes={declared}") from error
    source = _limited(gm.meta[KEY], growing_frequencies(model))
    gm.meta[KEY] = replace(
        source,
        **settings_of(model),
        dtype=_own_dtype(model),
        caches=() if caches is None else caches.pairs,
        mask=next((i.name for i in inputs if i.name == "attention_mask"), None),
    )
    if check and (notes := prove(gm, flat, samples_of(model, gm.meta[KEY]))):
        gm.meta[KEY] = replace(gm.meta[KEY], notes=(*source.notes, *notes))
    return gm


def _limited(source: Source, longest: int | None) -> Source:
    """The same with no text longer than this, where the model's rotary frequencies would change."""
    if longest is None:
        return source
    name = TOTAL if any(i.is_cache for i in source.inputs) else SEQUENCE
    low, high = source.bounds.get(name, (1, MAX_SIZE))
    if high <= longest:
        return source
    ranges = [one for one in source.ranges if one[0] != name]
    note = f"{name} is {low} to {longest:,}: rotary frequencies grow with longer texts (rope_type dynamic)"
    return replace(source, ranges=(*ranges, (name, low, longest)), notes=(*source.notes, note))


def settings_of(model: "PreTrainedModel") -> dict[str, Any]:
    """``config`` and ``generation_config`` of the ``Source``, as text."""
    config = model.config.to_diff_dict() | {"architectures": [type(model).__name__]}
    generation = getattr(model, "generation_config", None)
    own = json.dumps(generation.to_diff_dict(), sort_keys=True) if generation is not None else None
    return {"config": json.dumps(config, default=str, sort_keys=True), "generation_config": own}


def refuse_quantized(config: "PreTrainedConfig", instead: str = _BY_PATH) -> None:
    """Raises ``GraphError`` if the configuration says that the weights are quantized already, ending in ``instead``."""
    found = getattr(config, _QUANTIZATION, None)
    if found is not None:
        settings = cast(dict[str, Any], found if isinstance(found, dict) else found.to_dict())
        raise GraphError(
            f"quantization_config: this model is quantized already ({settings.get('quant_method', 'unknown method')});"
            f" {instead}"
        )


def _own_dtype(model: "PreTrainedModel") -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _plain(model: "PreTrainedModel") -> tuple[FlatModel, list[TensorInput]]:
    """An encoder or a vision model, by its main input."""
    config, arguments = model.config, arguments_of(model)
    inputs: list[TensorInput]
    match model.main_input_name:
        case "input_ids" if not getattr(config, "is_encoder_decoder", False):
            names = [n for n in ("input_ids", "attention_mask", "token_type_ids") if n in arguments]
            inputs = [TensorInput(n, torch.int64, (BATCH, SEQUENCE)) for n in names]
        case "pixel_values":
            size: Any = getattr(config, "image_size", 224)
            height, width = size if isinstance(size, list | tuple) else (size, size)
            shape = (BATCH, getattr(config, "num_channels", 3), height, width)
            inputs = [TensorInput("pixel_values", _own_dtype(model), shape)]
        case other:
            kind = "an encoder-decoder" if getattr(config, "is_encoder_decoder", False) else f"a model of {other}"
            raise GraphError(
                f"{type(model).__name__} is {kind}: pass example inputs of its forward (inputs=..., or --inputs with a"
                " safetensors file)"
            )

    def call(module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Any]:
        extra = {"use_cache": False} if "use_cache" in arguments else {}
        result = module(**tensors, **extra, return_dict=True)
        return {name: value for name, value in result.items() if value is not None}

    return FlatModel(model, [i.name for i in inputs], call), inputs


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _sample(model: nn.Module, wanted: TensorInput, sizes: Mapping[str, int]) -> Tensor:
    shape = [sizes[d] if isinstance(d, str) else d for d in wanted.shape]
    return torch.ones(shape, dtype=wanted.dtype, device=_device(model))


def read_config(path: Path, trust: bool = False, quantized: bool = False) -> "PreTrainedConfig":
    """The configuration in a model directory. Raises ``GraphError`` naming what is missing or wrong.

    ``trust``: code that the directory brings along is run, where it has a configuration of its own. ``quantized``: of
    weights that are quantized it is that of the model without them, and not refused.
    """
    if not path.is_dir():
        raise GraphError(f"{path}: no such model directory")
    if (path / MANIFEST).is_file() and not quantized:
        raise GraphError(f"{path}: a graphq artifact, which is quantized already; give the model that it was made of")
    if not (path / "config.json").is_file():
        adapters.refuse_adapter_alone(path)
        raise GraphError(f"{path}: not a Hugging Face model directory: config.json is missing")
    from transformers import AutoConfig

    try:
        config = cast(
            "PreTrainedConfig", AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=trust)
        )
    except Exception as error:  # one line for whatever transformers finds wrong with the file
        if not trust and has_code(path):
            raise GraphError(f"{path / 'config.json'}: {_UNTRUSTED}") from None
        raise GraphError(f"{path / 'config.json'}: {str(error).strip().splitlines()[0]}") from error
    if quantized and hasattr(config, _QUANTIZATION):
        delattr(config, _QUANTIZATION)
    try:
        refuse_quantized(config, _BY_OTHERS)
    except GraphError as error:
        raise GraphError(f"{path / 'config.json'}: {error}") from None
    return config


def model_class(path: Path, config: "PreTrainedConfig", trust: bool = False) -> type["PreTrainedModel"]:
    """The class that the configuration names first of those that transformers has, or with ``trust`` the directory.

    Raises ``GraphError`` if there is none.
    """
    import transformers

    names = config.architectures or []
    for name in names:
        found = getattr(transformers, name, None)
        if found is None and trust:
            found = class_of_code(path, config, name)
        if isinstance(found, type):
            return cast(type["PreTrainedModel"], found)
    own = f"; {_UNTRUSTED}" if not trust and has_code(path) else ""
    raise GraphError(
        f"{path / 'config.json'}: architectures {names} names no class of transformers {transformers.__version__}{own}"
    )


def load_model(path: Path, dtype: torch.dtype = torch.float32) -> "PreTrainedModel":
    """The model in a directory, on the CPU in ``dtype``, from safetensors alone (pickled weights are refused)."""
    return load(path, dtype)[0]


def load(path: Path, dtype: torch.dtype, trust: bool = False) -> tuple["PreTrainedModel", list[str]]:
    """The model in a directory, and the tensors of its files that the model has no place for.

    Raises ``GraphError`` for tensors that the files lack or hold in another shape.
    """
    config = read_config(path, trust)
    cls = model_class(path, config, trust)
    check_weight_files(path)
    try:
        with silent_transformers():
            loaded: Any = cls.from_pretrained(
                path,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, by name
            )
    except Exception as error:
        raise GraphError(f"{path}: {str(error).strip().splitlines()[0]}") from error
    model, info = loaded
    missing, wrong = sorted(info["missing_keys"]), sorted(str(k[0]) for k in info.get("mismatched_keys", ()))
    if missing or wrong:
        what = [f"{len(missing)} missing ({first_names(missing)})"] if missing else []
        what += [f"{len(wrong)} of another shape ({first_names(wrong)})"] if wrong else []
        raise GraphError(f"{path}: the weights do not fit {cls.__name__}: {'; '.join(what)}")
    return model.eval(), sorted(info["unexpected_keys"])


def unused_note(model: nn.Module, unused: list[str]) -> tuple[str, ...]:
    """A line on the tensors of a checkpoint that a model has no place for, if there are any."""
    count = f"{len(unused)} tensor{'s' * (len(unused) > 1)} of the checkpoint"
    return (f"{count} that {type(model).__name__} does not use: {first_names(unused)}",) if unused else ()


def capture_directory(
    path: Path,
    dtype: torch.dtype = torch.float32,
    weights: bool = True,
    cache: bool = True,
    shapes: Mapping[str, int] | None = None,
    unread: "Unread | None" = None,
    check: bool = False,
    trust: bool = False,
    quantized: bool = False,
) -> fx.GraphModule:
    """The graph of the model in a directory; its source dtype is the one its configuration records.

    ``weights=False`` reads the configuration alone: parameters are fake tensors on the CPU, the graph is the same.
    ``unread``: what captures it where parameters can stay in their files until they are used (``capture.unread``).
    ``check``: as for ``capture_pretrained``, where weights are held. ``trust``, ``quantized``: as for ``read_config``;
    weights that are quantized ``unread`` alone reads.
    """
    config = read_config(path, trust, quantized)
    recorded: Any = getattr(config, "dtype", None)  # before a model made from it overwrites it
    notes = adapters.adapter_note(path)
    gm = unread(path, dtype, cache, shapes) if weights and unread is not None and not trust else None
    if gm is None and weights:
        model, unused = load(path, dtype, trust)
        adapters.without_adapters(model)  # which transformers puts into a model where peft is installed
        gm = capture_pretrained(model, cache, shapes, check)
        notes = (*notes, *unused_note(model, unused))
    elif gm is None:
        gm = capture_config(config, model_class(path, config, trust), dtype, cache, shapes)
    source: Source = gm.meta[KEY]
    gm.meta[KEY] = replace(
        source,
        dtype=recorded if isinstance(recorded, torch.dtype) else source.dtype,
        files=str(path),
        notes=(*source.notes, *notes),
    )
    return gm


def capture_config(
    config: "PreTrainedConfig",
    cls: type["PreTrainedModel"],
    dtype: torch.dtype = torch.float32,
    cache: bool = True,
    shapes: Mapping[str, int] | None = None,
) -> fx.GraphModule:
    """The graph of a model that exists only as a configuration; its parameters are fake tensors on the CPU."""
    from transformers.initialization import no_init_weights

    with lean_export(), FakeTensorMode(allow_non_fake_inputs=True), silent_transformers(), no_init_weights():
        model = cast(Any, cls)._from_config(config, dtype=dtype).eval()
        return capture_pretrained(model, cache, shapes)
