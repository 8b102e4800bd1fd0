"""The DeepSeek mix for Ascend NPUs: one plan in three dialects, the same checkpoint, and what vLLM-Ascend reads of it.

Usage: python examples/deploy_ascend.py

A small DeepSeek-V3 with random weights takes the model's place. It is in float32: of a bfloat16 model msModelSlim
rounds scales and codes in bfloat16, as graphq does for its configs, and LLMC in float32. On an NPU the checkpoint is
served by ``vllm serve build/deploy_ascend/modelslim --quantization ascend``.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file
from torch import Tensor

import graphq

CONFIGS: Final = Path(__file__).resolve().parent / "configs"
OUT: Final = Path("build/deploy_ascend")
DIALECTS: Final = ("modelslim", "llmc", "native")


def small_deepseek(path: Path) -> None:
    """A DeepSeek-V3 of four blocks, the first three dense as in the real one, saved in ``path``."""
    import transformers

    sizes: dict[str, Any] = {"vocab_size": 256, "hidden_size": 256, "intermediate_size": 512}
    sizes |= {"moe_intermediate_size": 256}
    sizes |= {"num_hidden_layers": 4, "first_k_dense_replace": 3, "n_routed_experts": 4, "num_experts_per_tok": 2}
    sizes |= {"n_group": 2, "topk_group": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 64}
    sizes |= {"kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32}
    config = transformers.DeepseekV3Config(**sizes)
    torch.manual_seed(0)
    transformers.DeepseekV3ForCausalLM(config).save_pretrained(path)


def stored(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def main() -> None:
    """Compile the model by each config, compare the files, and show what describes them."""
    small_deepseek(OUT / "source")
    batches = list(torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0)).split(2))
    found: dict[str, dict[str, Tensor]] = {}
    for dialect in DIALECTS:
        spec = CONFIGS / dialect / "deepseek_w4a8_ascend.yaml"
        compiled = graphq.compile(OUT / "source", str(spec), target="ascend", calibration=batches)
        compiled.emit("ascend", OUT / dialect, overwrite=True)
        found[dialect] = stored(OUT / dialect)
        print(f"{OUT / dialect}: {len(found[dialect])} tensors, as compiled: {graphq.verify(OUT / dialect).ok}")
    first = found[DIALECTS[0]]
    same = [
        one.keys() == first.keys() and all(torch.equal(t, first[n]) for n, t in one.items()) for one in found.values()
    ]
    print(f"the same tensors from all three: {all(same)}")

    description = json.loads((OUT / DIALECTS[0] / "quant_model_description.json").read_text(encoding="utf-8"))
    print("\ntags of weights:", dict(Counter(tag for name, tag in description.items() if name.endswith(".weight"))))
    for name, tensor in first.items():
        if name.startswith("model.layers.3.mlp.experts.0.down_proj."):
            print(
                f"{name:57}  {description[name]:13}  {str(tensor.dtype).removeprefix('torch.'):8} {list(tensor.shape)}"
            )


if __name__ == "__main__":
    main()
