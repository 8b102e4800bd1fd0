"""lm-eval's tasks on anything that gives logits.

https://github.com/EleutherAI/lm-evaluation-harness, 0.4: ``lm_eval.api.model.TemplateLM``. Text is tokenized, cut and
scored as its own ``HFLM`` does.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graphq.data.language_model import LanguageModel
from graphq.errors import SpecError

_MOST = 256  # tokens that are generated where a task does not say, as lm-eval has it


def run_tasks(
    model: LanguageModel, tasks: Sequence[str], limit: int | None = None, shots: int | None = None
) -> dict[str, dict[str, float]]:
    """The numbers of each task, by the names of its metrics. Errors that are estimated stand under ``<metric>_stderr``.

    tasks: names of lm-eval's own, which it downloads, or YAML files, which name their data. limit: of documents a task.
    shots: examples in front of each. Raises ``SpecError`` where lm-eval is not installed, and for a task that it cannot
    read.
    """
    try:
        import lm_eval  # pyright: ignore[reportMissingImports]
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise SpecError("tasks: lm-eval is not installed: pip install 'graphq[lm-eval]'") from error
    files = [Path(one) for one in tasks if one.endswith((".yaml", ".yml"))]
    if missing := [str(one) for one in files if not one.is_file()]:
        raise SpecError(f"{missing[0]}: no such file")
    names = [Path(one).stem if one.endswith((".yaml", ".yml")) else one for one in tasks]
    folders = list(dict.fromkeys(str(one.resolve().parent) for one in files))
    try:
        manager: Any = TaskManager(include_path=folders or None, include_defaults=len(files) < len(tasks))
        found: Any = lm_eval.simple_evaluate(
            harness_model(model),
            tasks=names,
            task_manager=manager,
            limit=limit,
            num_fewshot=shots,
            bootstrap_iters=0,
            log_samples=False,
        )
    except (ValueError, KeyError, OSError, ImportError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SpecError(f"tasks: {', '.join(tasks)}: lm-eval: {first}") from error
    return {name: _numbers(row) for name, row in found["results"].items()}


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    """The metrics of a task: lm-eval calls them ``<metric>,<filter>``."""
    numbers = {key: value for key, value in row.items() if "," in key and isinstance(value, int | float)}
    return {key.removesuffix(",none").replace(",none", ""): float(value) for key, value in numbers.items()}


def harness_model(model: LanguageModel) -> Any:
    """The model as lm-eval calls it."""
    from lm_eval import utils  # pyright: ignore[reportMissingImports]
    from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]

    vocabulary = model.tokenizer.vocabulary

    class Harness(TemplateLM):  # pyright: ignore[reportUntypedBaseClass]
        """One text at a time."""

        @property
        def eot_token_id(self) -> int:
            return next(iter(model.ends), model.start)

        @property
        def prefix_token_id(self) -> int:
            return model.start

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return vocabulary.encode(string, add_special_tokens=add_special_tokens is not False).ids

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            return [model.likelihood(context, continuation) for _, context, continuation in requests]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            return [self._rolling(request.args[0]) for request in requests]

        def _rolling(self, text: str) -> float:
            windows = utils.get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, model.longest, 1)
            return sum(model.likelihood(*utils.make_disjoint_window(window))[0] for window in windows)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return [self._continued(*request.args) for request in requests]

        def _continued(self, text: str, options: dict[str, Any]) -> str:
            if options.get("do_sample") or options.get("temperature"):
                raise ValueError("the task samples its text; here the likeliest is taken: set do_sample: false")
            until = options.get("until") or []
            names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
            most = next((options[name] for name in names if options.get(name)), _MOST)
            return model.continued(text, most, [until] if isinstance(until, str) else until)

    return Harness()
