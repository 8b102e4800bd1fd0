"""vLLM on the CPU loads compressed-tensors checkpoints, and its prompt's probabilities are those of the QDQ form.

https://github.com/vllm-project/vllm, whose CPU build brings packages that fail to import beside it: they are removed
from its environment. Run by ``judges.py``, or as

    OMP_NUM_THREADS=1 .venv/bin/python judges/run_vllm.py .judges/vllm/bin/python [SCHEME ...]

The language model of the examples is compiled and written in each scheme here; the client's Python runs this script
once more, to load each and to score a text of ``TOKENS`` tokens. What is compared is the mean Kullback-Leibler
divergence of the QDQ form's next-token distributions from vLLM's. The bound is twice what llm-compressor's own
checkpoints of the scheme were seen to have: vLLM computes in bfloat16, and rounds activations' codes from there.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[1]
MODEL: Final = ROOT / "examples" / "models" / "stdlib-llama"
TOKENS: Final = 128
_INT8: Final = "weight: int8/half/channel\ninput: int8/token/dynamic"
_DOWN: Final = "rules: [{match: down_proj, weight: int8/half/channel, input: int8/token/dynamic}]"
SCHEMES: Final = {  # the spec, and the divergence of llm-compressor's checkpoint from its own model
    "W4A16": ("weight: int4/half/g128", 2e-4),
    "W4A16_ASYM": ("weight: int4/asym/joint/g128", 2e-4),
    "W4A16_channel": ("weight: int4/half/channel", 2e-4),
    "W8A8": (_INT8, 1.7e-3),
    "W8A8_static": ("weight: int8/half/channel\ninput: int8/half/tensor", 4.5e-3),
    "W8A8_static_asym": ("weight: int8/half/channel\ninput: int8/asym/joint/tensor", 4.5e-3),
    "W4A8": ("weight: int4/half/g128\ninput: int8/token/dynamic", 2e-3),
    "FP8_DYNAMIC": ("weight: float8_e4m3fn/channel\ninput: float8_e4m3fn/token/dynamic", 4e-3),
    "W4A16, W8A8 down_proj": (f"weight: int4/half/g128\n{_DOWN}", 6e-4),
}
_UNIMPORTABLE: Final = ("torchvision", "torchaudio", "torchcodec")


def main(client: str, names: list[str]) -> int:
    """0 where vLLM computes what was compiled, in every scheme."""
    import torch
    from tokenizers import Tokenizer

    import graphq

    tokenizer: Any = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    ids = tokenizer.encode((ROOT / "examples" / "models" / "stdlib-llama" / "train.py").read_text()).ids
    batch = torch.tensor([ids[TOKENS : 2 * TOKENS]])
    subprocess.run([client, "-m", "pip", "uninstall", "--quiet", "--yes", *_UNIMPORTABLE], check=True)
    wanted: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        for name in names or list(SCHEMES):
            spec = f"graphq: 1\n{SCHEMES[name][0]}"
            made = graphq.compile(MODEL, spec, target="compressed-tensors", calibration=[batch])
            made.emit("compressed-tensors", Path(place) / name)
            with torch.no_grad():
                given: Any = made(input_ids=torch.tensor([ids[:TOKENS]]))
            logits = given.logits[0, :-1]
            wanted[name] = torch.log_softmax(logits.float(), -1)
        faults = 0
        for name, reference in wanted.items():
            told = json.dumps([str(Path(place) / name), ids[:TOKENS], str(Path(place) / "found.json")])
            ran = subprocess.run([client, __file__, "--client", told], stdout=sys.stderr, check=False)
            if ran.returncode:
                print(f"{name}: vLLM ended with exit status {ran.returncode}", file=sys.stderr)
                faults += 1
                continue
            found = torch.tensor(json.loads((Path(place) / "found.json").read_text()))
            divergence = float((reference.exp() * (reference - found)).sum(-1).mean())
            bound = 2 * SCHEMES[name][1]
            print(f"{name}: divergence {divergence:.1e}, at most {bound:.1e}", flush=True)
            faults += not divergence <= bound
    return int(faults > 0)


def score(told: str) -> int:
    """Writes vLLM's log probabilities of all tokens at each place of the prompt as JSON. Runs in its Python."""
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    folder, ids, out = json.loads(told)
    model: Any = LLM(
        model=folder,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=512,
        max_num_batched_tokens=512,
        max_num_seqs=4,
        enable_prefix_caching=False,
        max_logprobs=-1,
        seed=0,
    )
    asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=-1, detokenize=False)
    (given,) = model.generate([{"prompt_token_ids": ids}], asked, use_tqdm=False)
    rows = [[one.logprob for _, one in sorted(row.items())] for row in given.prompt_logprobs[1:]]
    Path(out).write_text(json.dumps(rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    os.environ.update(
        {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_TARGET_DEVICE": "cpu",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
        }
    )
    sys.exit(score(sys.argv[2]) if sys.argv[1] == "--client" else main(sys.argv[1], sys.argv[2:]))
