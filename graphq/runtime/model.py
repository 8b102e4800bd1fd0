"""A compiled model as it is deployed: packed weights, the source's calling convention, generation for causal LMs."""

import copy
import traceback
from collections.abc import Sequence
from typing import Any, Final, Literal, Self, cast, final

import torch
from torch import Tensor, fx, nn

from graphq.capture.source import Source, source_of
from graphq.errors import GraphqError, SpecError
from graphq.runtime.calls import Outputs, call
from graphq.runtime.configuration import configuration
from graphq.runtime.linear import kernel_of
from graphq.runtime.pickling import NotPickled
from graphq.runtime.program import Append, Program, concatenated, line_of
from graphq.runtime.quantized_module import QuantizedModule

_OUT_OF_MEMORY: Final = "can't allocate memory"  # as torch's allocator for the CPU says


@final
class CompiledModel(NotPickled, nn.Module):
    """A captured graph behind the source's inputs and outputs.

    Calling it takes the captured inputs in the source's order or by name, and returns what the source returned: a
    tensor, a tuple, or a dict by name (a transformers model: a ``ModelOutput``; a causal language model: ``logits`` and
    ``present.{i}.key|value``). Masks, positions and empty caches may be left out.

    It has what lm-eval's ``HFLM`` and transformers' pipelines ask of a model: ``config``, ``generation_config``,
    ``device``, ``dtype``, ``generate``, ``can_generate`` and ``tie_weights``.
    """

    graph: fx.GraphModule
    _generator: Any
    _config: Any
    _program: Program | None

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        # Its tensors and modules are the graph's own, so that their names are the layers' and ``to`` moves both.
        self.__dict__ |= {"graph": graph, "_generator": None, "_config": None, "_program": None} | {
            kind: graph.__dict__[kind] for kind in ("_parameters", "_buffers", "_modules")
        }
        self.train(graph.training)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)(copy.deepcopy(self.graph, memo))

    @property
    def source(self) -> Source:
        """What capture recorded of the source."""
        return source_of(self.graph)

    @property
    def kernels(self) -> dict[str, str]:
        """For each layer with packed codes what computes it on this machine, and why it is not something faster."""
        return {path: kernel_of(m) for path, m in self.named_modules() if isinstance(m, QuantizedModule)}

    @property
    def config(self) -> Any:
        """The configuration of a transformers model; where transformers is not installed, a namespace of its settings.

        Raises ``AttributeError`` for another model.
        """
        if self._config is None:
            if self.source.config is None:
                raise AttributeError("config: the source is not a model of transformers")
            self.__dict__["_config"] = configuration(self.source.config)
        return self._config

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return next((x.device for x in (*self.buffers(), *self.parameters())), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that it computes in."""
        codes = any(i.name in self.source.pasts and not i.dtype.is_floating_point for i in self.source.inputs)
        # Beside codes, a cache holds scales in a dtype of their own.
        taken = [i.dtype for i in self.source.inputs if not (codes and i.name in self.source.pasts)]
        made = [m.graphq_form.dtype for m in self.modules() if isinstance(m, QuantizedModule)]
        held = [x.dtype for x in (*self.parameters(), *self.buffers())]
        return next((d for d in (*taken, *made, *held) if d.is_floating_point), self.source.dtype)

    def forward(self, *args: object, **kwargs: object) -> Outputs:
        """See ``graphq.runtime.calls.call``."""
        try:
            return call(self.source, self._run, args, kwargs)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, MemoryError) or _OUT_OF_MEMORY in str(error):
                raise GraphqError(f"{_line_of(error)}: needs more memory than there is") from error
            raise

    def _run(self, inputs: Sequence[Tensor], append: Append = concatenated) -> tuple[Tensor, ...]:
        """The flat outputs for all flat inputs. Raises ``SpecError`` for another ``append`` to caches that do more."""
        if torch.compiler.is_compiling():
            return cast(tuple[Tensor, ...], self.graph(*inputs))
        program = self._program
        if program is None or not program.is_of(self.graph):
            program = self.__dict__["_program"] = Program(self.graph, self.source)
        if append is not concatenated and len(program.appended) < len(self.source.caches):
            raise SpecError("cache: this model does more with its cache than to append to it; give a DynamicCache()")
        return program(*inputs, append=append)

    def generate(self, *args: Any, cache: Literal["dynamic", "static"] = "dynamic", **kwargs: Any) -> Any:
        """``transformers``' ``generate`` on this model: greedy, sampling, beams, left padding, with the KV cache.

        ``cache``: ``"static"`` has memory for the longest text that may come out (``max_length``, or the prompt and
        ``max_new_tokens``) from the start, and copies nothing at a step; the tokens are the same.

        Raises ``GraphqError`` for models that are not causal language models with a cache. Needs transformers.
        """
        model = self._transformers_model()
        if self.source.has_states:
            from graphq.runtime.stepping import StateCache

            if cache != "dynamic":
                raise SpecError(f"generate: cache={cache!r}: this model keeps states beside keys and values")
            kwargs = {"past_key_values": StateCache(), **kwargs}
        elif cache != "dynamic":
            from graphq.runtime.generation import static_cache

            kwargs = {"past_key_values": static_cache(cache, model.generation_config, args, kwargs), **kwargs}
        with torch.inference_mode():
            return model.generate(*args, **kwargs)

    @property
    def generation_config(self) -> Any:
        """What ``generate`` does by default; changes of it last. Raises what ``generate`` raises."""
        return self._transformers_model().generation_config

    def can_generate(self) -> bool:
        """Whether it is a causal language model captured with its key/value cache."""
        source = self.source
        return source.is_causal_lm and source.config is not None and bool(source.caches)

    @property
    def input_modalities(self) -> Any:
        """What transformers' pipelines say of it."""
        return self._transformers_model().input_modalities

    @property
    def output_modalities(self) -> Any:
        """What transformers' pipelines say of it."""
        return self._transformers_model().output_modalities

    def tie_weights(self) -> None:
        """Nothing is left to do: what was tied in the source is one tensor."""

    def _transformers_model(self) -> Any:
        if not self.can_generate():
            raise GraphqError("generate: this model is not a causal language model captured with its key/value cache")
        if self._generator is None:
            from graphq.runtime.generation import generator

            self.__dict__["_generator"] = generator(self.graph, self._run, self.source, self.config)
        return self._generator


def _line_of(error: BaseException) -> str:
    """The node of a graph that an error comes from."""
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    return next((text for file, line in reversed(frames) if (text := line_of(file, line))), "the call")
