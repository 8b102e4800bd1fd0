"""A tiny model of each family of transformers, as data: two layers or so, random weights, a small vocabulary.

A configuration has the sizes of ``SIZES`` wherever its class knows them, so that a row says only what the family has of
its own.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Final, cast, final

import torch
from torch import Tensor

Inputs = Callable[[], dict[str, Tensor]]
IMAGE: Final = 5  # the token that stands for a part of an image

SIZES: Final[dict[str, Any]] = {
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "embed_dim", "word_embed_proj_dim", "dim"], 64),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "d_ff", "ffn_hidden_size", "n_inner", "mlp_dim"], 96),
    **dict.fromkeys(["encoder_ffn_dim", "decoder_ffn_dim", "feed_forward_hidden_size", "hidden_dim"], 96),
    **dict.fromkeys(["num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth"], 2),
    **dict.fromkeys(["encoder_layers", "decoder_layers", "num_decoder_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "num_heads", "n_head", "n_heads"], 4),
    **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 4),
    "num_key_value_heads": 2,
    "head_dim": 16,
    "d_kv": 16,
    "rotary_dim": 8,
    "vocab_size": 128,
    "vocab_size_per_layer_input": 128,
    "sliding_window": 8,
    "image_token_id": 5,
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"], 128),
    "max_source_positions": 64,
    "max_target_positions": 64,
    **dict.fromkeys(["num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_topk", "moe_k", "n_group"], 2),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"], 48),
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "moe_layer_start_index": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "index_topk": 4,
    "index_n_heads": 4,
    "index_head_dim": 16,
    "image_size": 32,
    "patch_size": 8,
    "num_mel_bins": 8,
    "out_hidden_size": 64,
    "projection_dim": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "n_groups": 1,
    "chunk_size": 8,
    "state_size": 8,
    "mamba_dt_rank": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
}


@final
@dataclasses.dataclass(frozen=True)
class Family:
    """A family: its class of models, and what its tiny configuration has beside ``SIZES``.

    ``config``: the class of the configuration, where it is not the model's own. ``inputs``: what the model is captured
    from; None where that follows from its configuration.
    """

    name: str
    kind: str
    model: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    config: str | None = None
    inputs: Inputs | None = None

    def build(self) -> Any:
        """The model, with the same random weights each time, in evaluation mode."""
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        cls = getattr(transformers, self.model)
        config = cls.config_class if self.config is None else getattr(transformers, self.config)
        made = tiny_config(config, self.options)
        torch.manual_seed(0)
        model = cls(made).eval()
        for x in model.parameters():
            if not torch.isfinite(x).all() or not x.any():
                # What is left empty, or at zero, would hide its layer.
                x.data = 0.1 * torch.randn(x.shape)
        return model


def tiny_config(cls: Any, options: Mapping[str, Any]) -> Any:
    """A configuration of these ``options`` on top of ``SIZES``, and so of those that it holds."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    own = dict(options)
    values = {field.name: SIZES[field.name] for field in dataclasses.fields(cls) if field.name in SIZES}
    for name, held in (getattr(cls, "sub_configs", None) or {}).items():
        given = own.pop(name, {})
        if not isinstance(given, Mapping):
            values[name] = given
            continue
        inner = dict(cast(Mapping[str, Any], given))
        kind = inner.pop("model_type", None)
        if kind is not None:
            held = CONFIG_MAPPING[kind]
        elif held is AutoConfig:
            default = getattr(cls(), name)
            if default is None:
                continue
            held = type(default)
        values[name] = tiny_config(held, inner)
    return cls(**(values | own))


def text(*shape: int) -> Tensor:
    """Drawn tokens without special ones."""
    return torch.randint(10, 100, shape, generator=torch.Generator().manual_seed(1))


def floats(*shape: int) -> Tensor:
    """Drawn numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def pairs() -> dict[str, Tensor]:
    """Text for an encoder, and other text for its decoder."""
    return {"input_ids": text(2, 7), "attention_mask": torch.ones(2, 7).long(), "decoder_input_ids": text(2, 5)}


def speech() -> dict[str, Tensor]:
    """A spectrogram, and text for the decoder."""
    return {"input_features": floats(2, 8, 128), "decoder_input_ids": text(2, 5)}


def wave() -> dict[str, Tensor]:
    """Samples of sound."""
    return {"input_values": floats(2, 800)}


def spectrogram() -> dict[str, Tensor]:
    """A spectrogram, by time and frequency."""
    return {"input_values": floats(2, 32, 16)}


def features() -> dict[str, Tensor]:
    """A spectrogram, by frequency and time."""
    return {"input_features": floats(2, 8, 128)}


def pixels(size: int = 32) -> Inputs:
    """Two square images."""
    return lambda: {"pixel_values": floats(2, 3, size, size)}


def captions() -> dict[str, Tensor]:
    """Two images and two texts."""
    return {"input_ids": text(2, 7), "pixel_values": floats(2, 3, 32, 32)}


def prompt(places: int, image: Tensor, token: int = IMAGE, **others: Tensor) -> Inputs:
    """Text with ``places`` tokens that stand for what becomes of the images, in each of two prompts."""

    def inputs() -> dict[str, Tensor]:
        ids = text(2, places + 6)
        ids[:, 2 : 2 + places] = token
        return {"input_ids": ids, "pixel_values": image, **others}

    return inputs


def patches(places: int, width: int, grid: tuple[int, int, int], token: int = IMAGE) -> Inputs:
    """Text with places of two images, which are given as patches with their numbers along time, height and width."""
    count = grid[0] * grid[1] * grid[2]
    kinds = (prompt(places, floats(1))()["input_ids"] == token).int()
    grids = torch.tensor([grid, grid])
    return prompt(places, floats(2 * count, width), token, image_grid_thw=grids, mm_token_type_ids=kinds)


_EXPERTS = {"num_key_value_heads": 4}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
_VISION = {"vision_config": {}}
_T5 = {"decoder_start_token_id": 0}
_BART = {"decoder_start_token_id": 2, "forced_eos_token_id": None}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
}
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
_AUDIO = {
    "conv_dim": [16, 16],
    "conv_stride": [5, 4],
    "conv_kernel": [10, 4],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}


def _language() -> list[Family]:
    """Decoders with attention alone."""
    plain = {
        "llama": "Llama", "mistral": "Mistral", "ministral": "Ministral", "ministral3": "Ministral3",
        "mixtral": "Mixtral", "qwen2": "Qwen2", "qwen2-moe": "Qwen2Moe", "qwen3": "Qwen3", "qwen3-moe": "Qwen3Moe",
        "gemma": "Gemma", "gemma2": "Gemma2", "vaultgemma": "VaultGemma", "phi": "Phi", "phi3": "Phi3",
        "phimoe": "Phimoe", "olmo": "Olmo", "olmo2": "Olmo2", "olmoe": "Olmoe", "flex-olmo": "FlexOlmo",
        "cohere": "Cohere", "glm": "Glm", "glm4": "Glm4", "glm4-moe": "Glm4Moe", "gpt-neox": "GPTNeoX",
        "gpt-oss": "GptOss", "bloom": "Bloom", "stablelm": "StableLm", "starcoder2": "Starcoder2", "granite": "Granite",
        "granitemoe": "GraniteMoe", "granitemoeshared": "GraniteMoeShared", "helium": "Helium",
        "hunyuan-dense": "HunYuanDenseV1", "hunyuan-moe": "HunYuanMoEV1", "ernie4.5": "Ernie4_5",
        "ernie4.5-moe": "Ernie4_5_Moe", "smollm3": "SmolLM3", "seed-oss": "SeedOss", "nemotron": "Nemotron",
        "persimmon": "Persimmon", "dots1": "Dots1", "doge": "Doge", "apertus": "Apertus", "arcee": "Arcee",
        "bitnet": "BitNet", "biogpt": "BioGpt", "diffllama": "DiffLlama", "minimax-m2": "MiniMaxM2",
        "mimo-v2-flash": "MiMoV2Flash", "nanochat": "NanoChat", "xglm": "XGLM", "solar-open": "SolarOpen",
        "hy-v3": "HYV3", "cwm": "Cwm", "opt": "OPT", "falcon": "Falcon", "mpt": "Mpt", "jais2": "Jais2",
        "aria-text": "AriaText", "trocr": "TrOCR",
    }  # fmt: skip
    rows = [Family(name, "language", f"{cls}ForCausalLM") for name, cls in plain.items()]
    low_rank = {
        "deepseek-v2": "DeepseekV2", "deepseek-v3": "DeepseekV3", "deepseek-v3.2": "DeepseekV32",
        "glm4-moe-lite": "Glm4MoeLite", "glm-5": "GlmMoeDsa", "minicpm3": "MiniCPM3", "youtu": "Youtu",
    }  # fmt: skip
    # head_dim and rotary_dim are those of the rotary part alone
    rows += [
        Family(name, "language", f"{cls}ForCausalLM", _EXPERTS | {"head_dim": 8}) for name, cls in low_rank.items()
    ]
    sliding = {
        "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig"), "cohere2": ("Cohere2ForCausalLM", None),
        "olmo3": ("Olmo3ForCausalLM", None), "exaone4": ("Exaone4ForCausalLM", None),
        "exaone-moe": ("ExaoneMoeForCausalLM", None), "gemma4": ("Gemma4ForCausalLM", "Gemma4TextConfig"),
        "afmoe": ("AfmoeForCausalLM", None), "modernbert-decoder": ("ModernBertDecoderForCausalLM", None),
    }  # fmt: skip
    rows += [Family(name, "language", cls, _SLIDING, config) for name, (cls, config) in sliding.items()]
    llamas = {"llama-yarn": _YARN, "llama-dynamic-rope": _DYNAMIC}
    rows += [Family(name, "language", "LlamaForCausalLM", {"rope_parameters": value}) for name, value in llamas.items()]
    trained = {"original_max_position_embeddings": 64}
    rows.append(Family("phi3-longrope", "language", "Phi3ForCausalLM", {"rope_parameters": _LONG, **trained}))
    return [
        *rows,
        Family("gemma3n", "language", "Gemma3nForCausalLM",
               _SLIDING | {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
                           "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 16, "laurel_rank": 8,
                           "activation_sparsity_pattern": [0.9, 0.0, 0.0, 0.0]}, "Gemma3nTextConfig"),
        Family("llama4", "language", "Llama4ForCausalLM", {"attention_chunk_size": 64, "intermediate_size_mlp": 96},
               "Llama4TextConfig"),
        Family("gpt2", "language", "GPT2LMHeadModel"),
        Family("deepseek-v4", "language", "DeepseekV4ForCausalLM",
               {"num_key_value_heads": 1, "o_groups": 2, "o_lora_rank": 16, "hc_mult": 2}),
        Family("ctrl", "language", "CTRLLMHeadModel", {"dff": 96}),
        Family("openai-gpt", "language", "OpenAIGPTLMHeadModel"),
        Family("gpt-neo", "language", "GPTNeoForCausalLM", {"attention_types": [[["global", "local"], 1]]}),
        Family("gptj", "language", "GPTJForCausalLM"),
        Family("codegen", "language", "CodeGenForCausalLM"),
        Family("gpt-bigcode", "language", "GPTBigCodeForCausalLM"),
        Family("jetmoe", "language", "JetMoeForCausalLM", {"kv_channels": 16}),
        Family("falcon-new", "language", "FalconForCausalLM", {"new_decoder_architecture": True, "num_kv_heads": 2}),
        Family("dbrx", "language", "DbrxForCausalLM",
               {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
                "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2},
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
        Family("longcat-flash", "language", "LongcatFlashForCausalLM",
               {"num_key_value_heads": 4, "head_dim": 8, "zero_expert_num": 2, "num_hidden_layers": 4,
                "expert_ffn_hidden_size": 48}),
        Family("roberta-decoder", "language", "RobertaForCausalLM", {"is_decoder": True, "pad_token_id": 1}),
    ]  # fmt: skip


def _recurrent() -> list[Family]:
    """Decoders with states of convolutions and recurrences, alone and beside attention."""
    mixed = [
        ("qwen3.5", "Qwen3_5ForCausalLM", "Qwen3_5TextConfig", _LINEAR),
        ("qwen3.5-moe", "Qwen3_5MoeForCausalLM", "Qwen3_5MoeTextConfig", _LINEAR),
        ("qwen3-next", "Qwen3NextForCausalLM", None, _LINEAR),
        ("olmo-hybrid", "OlmoHybridForCausalLM", None, _LINEAR),
        ("kimi-linear", "KimiLinearForCausalLM", None, _LINEAR | _EXPERTS | {"q_lora_rank": None}),
        ("minimax", "MiniMaxForCausalLM", None, _LINEAR | {"block_size": 8, "sliding_window": None}),
        ("nemotron-h", "NemotronHForCausalLM", None,
         {"layers_block_type": ["mamba", "attention", "mlp"], "moe_shared_expert_intermediate_size": 48}),
        ("granite4", "GraniteMoeHybridForCausalLM", None,
         {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 48}),
        ("lfm2", "Lfm2ForCausalLM", None, {"layer_types": ["conv", "full_attention"]}),
        ("lfm2-moe", "Lfm2MoeForCausalLM", None,
         {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
        ("jamba", "JambaForCausalLM", None, {"attn_layer_period": 2, "attn_layer_offset": 1}),
        ("bamba", "BambaForCausalLM", None, {"attn_layer_indices": [1]}),
        ("falcon-h1", "FalconH1ForCausalLM", None, {"mamba_d_ssm": 128}),
        ("recurrent-gemma", "RecurrentGemmaForCausalLM", None,
         {"num_hidden_layers": 3, "attention_window_size": 8, "lru_width": 64}),
        ("zamba", "ZambaForCausalLM", None,
         {"num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 1, "n_mamba_heads": 2,
          "attention_hidden_size": 128, "attention_head_dim": 32}),
        ("zamba2", "Zamba2ForCausalLM", None,
         {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"], "mamba_ngroups": 1,
          "n_mamba_heads": 8, "mamba_headdim": 16, "adapter_rank": 8, "num_mem_blocks": 1}),
        ("mamba", "MambaForCausalLM", None, {}),
        ("mamba2", "Mamba2ForCausalLM", None, {"num_heads": 8, "head_dim": 16}),
        ("falcon-mamba", "FalconMambaForCausalLM", None, {}),
        ("rwkv", "RwkvForCausalLM", None, {"context_length": 128, "attention_hidden_size": 64}),
        ("xlstm", "xLSTMForCausalLM", None, {"chunk_size": 16, "qk_dim_factor": 1.0}),
    ]  # fmt: skip
    return [Family(name, "recurrent", cls, options, config) for name, cls, config, options in mixed]


def _encoders() -> list[Family]:
    """Encoders of text, images and sound, and pairs of encoder and decoder."""
    texts = {
        "bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert",
        "distilbert": "DistilBert", "electra": "Electra", "albert": "Albert", "deberta-v2": "DebertaV2",
        "mpnet": "MPNet", "modernbert": "ModernBert", "nomic-bert": "NomicBert", "eurobert": "EuroBert", "esm": "Esm",
        "ernie": "Ernie", "convbert": "ConvBert", "rembert": "RemBert", "fnet": "FNet",
    }  # fmt: skip
    images = {
        "vit": "ViT", "deit": "DeiT", "beit": "Beit", "dinov2": "Dinov2", "dinov3": "DINOv3ViT", "ijepa": "IJepa",
        "siglip-vision": "SiglipVision", "clip-vision": "CLIPVision", "vit-msn": "ViTMSN",
    }  # fmt: skip
    rows = [Family(name, "encoder", f"{cls}Model") for name, cls in texts.items()]
    rows += [Family(name, "vision", f"{cls}Model") for name, cls in images.items()]
    pairs_of = {
        "t5": ("T5", _T5), "mt5": ("MT5", _T5), "umt5": ("UMT5", _T5), "switch-transformers": ("SwitchTransformers",
        _T5 | {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}), "bart": ("Bart", _BART),
        "mbart": ("MBart", _BART), "pegasus": ("Pegasus", _BART), "plbart": ("PLBart", _BART),
        "m2m-100": ("M2M100", _BART), "blenderbot": ("Blenderbot", _BART), "led": ("LED", _BART),
    }  # fmt: skip
    rows += [
        Family(name, "encoder-decoder", f"{cls}ForConditionalGeneration", options, inputs=pairs)
        for name, (cls, options) in pairs_of.items()
    ]
    sounds = {"wav2vec2": "Wav2Vec2", "hubert": "Hubert", "wavlm": "WavLM", "unispeech": "UniSpeech"}
    rows += [Family(name, "audio", f"{cls}Model", _AUDIO, inputs=wave) for name, cls in sounds.items()]
    stages = {"hidden_sizes": [8, 16], "depths": [1, 1]}
    return [
        *rows,
        Family("marian", "encoder-decoder", "MarianMTModel", _BART | {"decoder_vocab_size": 128}, inputs=pairs),
        Family("t5gemma", "encoder-decoder", "T5GemmaForConditionalGeneration",
               {"encoder": _SLIDING, "decoder": _SLIDING}, inputs=pairs),
        Family("whisper", "encoder-decoder", "WhisperForConditionalGeneration",
               _BART | {"suppress_tokens": None, "begin_suppress_tokens": None}, inputs=speech),
        Family("whisper-encoder", "audio", "WhisperForAudioClassification", {"use_weighted_layer_sum": False},
               inputs=features),
        Family("ast", "audio", "ASTModel", {"max_length": 32, "num_mel_bins": 16}, inputs=spectrogram),
        Family("swin", "vision", "SwinModel", {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
                                               "window_size": 2, "patch_size": 4}),
        Family("convnext", "vision", "ConvNextModel", {"num_stages": 2, **stages}),
        Family("resnet", "vision", "ResNetModel", {"embedding_size": 8, "layer_type": "basic", **stages}),
        Family("mobilenet-v2", "vision", "MobileNetV2Model", {"depth_multiplier": 0.25}),
        Family("regnet", "vision", "RegNetModel", {"embedding_size": 8, "groups_width": 8, **stages}),
        Family("segformer", "vision", "SegformerModel",
               {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32],
                "patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}),
        Family("depth-anything", "vision", "DepthAnythingForDepthEstimation",
               {"backbone_config": {"model_type": "dinov2", "out_features": ["stage1", "stage2"],
                                    "reshape_hidden_states": False},
                "patch_size": 8, "reassemble_hidden_size": 64, "reassemble_factors": [2, 1],
                "neck_hidden_sizes": [16, 16], "fusion_hidden_size": 16, "head_hidden_size": 8}, inputs=pixels()),
        Family("yolos", "vision", "YolosModel", {"image_size": [32, 32], "num_detection_tokens": 4}),
    ]  # fmt: skip


def _two_halves() -> list[Family]:
    """Models of images and text."""
    tower = {"text_config": {}, "vision_config": {}}
    mrope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    qwen = {"embed_dim": 64, "fullatt_block_indexes": [1], "window_size": 32}
    return [
        Family("clip", "vision-language", "CLIPModel", tower, inputs=captions),
        Family("siglip", "vision-language", "SiglipModel", tower, inputs=captions),
        Family("qwen2-vl", "vision-language", "Qwen2VLForConditionalGeneration",
               {"text_config": {"rope_parameters": mrope}, "vision_config": {"embed_dim": 64, "hidden_size": 64,
                "mlp_ratio": 2}}, inputs=patches(4, 384, (1, 4, 4))),
        Family("qwen2.5-vl", "vision-language", "Qwen2_5_VLForConditionalGeneration",
               {"text_config": {"rope_parameters": mrope}, "vision_config": qwen}, inputs=patches(4, 384, (1, 4, 4))),
        Family("qwen3-vl", "vision-language", "Qwen3VLForConditionalGeneration",
               {"text_config": {"rope_parameters": mrope | {"mrope_interleaved": True}},
                "vision_config": {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}},
               inputs=patches(4, 384, (1, 4, 4))),
        Family("gemma3-vision", "vision-language", "Gemma3ForConditionalGeneration",
               {"text_config": _SLIDING, "vision_config": {}, "mm_tokens_per_image": 4, "image_token_index": 5},
               inputs=prompt(4, floats(2, 3, 32, 32))),
        Family("paligemma", "vision-language", "PaliGemmaForConditionalGeneration",
               {"text_config": {"model_type": "gemma"}, "projection_dim": 64,
                "vision_config": {"model_type": "siglip_vision_model", "projection_dim": 64},
                "image_token_index": 5},
               inputs=prompt(16, floats(2, 3, 32, 32))),
        Family("mistral3", "vision-language", "Mistral3ForConditionalGeneration",
               {"text_config": {"model_type": "mistral"}, "vision_config": {"model_type": "pixtral"},
                "image_token_index": 5},
               inputs=prompt(4, floats(2, 3, 32, 32), image_sizes=torch.tensor([[32, 32], [32, 32]]))),
        Family("llava", "vision-language", "LlavaForConditionalGeneration",
               {"text_config": {"model_type": "llama"}, "vision_config": {"model_type": "clip_vision_model"},
                "image_token_index": 5}, inputs=prompt(16, floats(2, 3, 32, 32))),
        Family("smolvlm", "vision-language", "SmolVLMForConditionalGeneration",
               {"text_config": {"model_type": "llama"}, "vision_config": {}, "scale_factor": 2},
               inputs=prompt(4, floats(2, 1, 3, 32, 32))),
        Family("idefics3", "vision-language", "Idefics3ForConditionalGeneration",
               {"text_config": {"model_type": "llama"}, "vision_config": {}, "scale_factor": 2},
               inputs=prompt(4, floats(2, 1, 3, 32, 32))),
        Family("internvl", "vision-language", "InternVLForConditionalGeneration",
               {"text_config": {"model_type": "qwen2"}, "vision_config": {"image_size": [32, 32], "patch_size": [8, 8]}},
               inputs=prompt(4, floats(2, 3, 32, 32))),
        Family("llama4-vision", "vision-language", "Llama4ForConditionalGeneration",
               {"text_config": {"attention_chunk_size": 64, "intermediate_size_mlp": 96},
                "vision_config": {"vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64,
                                  "intermediate_size": 256}, "image_token_index": 5},
               inputs=prompt(4, floats(2, 3, 32, 32))),
        Family("mllama", "vision-language", "MllamaForCausalLM", {"cross_attention_layers": [1]}, "MllamaTextConfig"),
    ]  # fmt: skip


def _language_halves() -> list[Family]:
    """Models of images and text, captured without images: their language models, with the heads."""
    captioning = ("clip", "siglip")
    return [
        dataclasses.replace(one, name=f"{one.name}-text", inputs=None)
        for one in _two_halves()
        if one.inputs is not None and one.name not in captioning
    ]


FAMILIES: Final = (*_language(), *_recurrent(), *_encoders(), *_two_halves(), *_language_halves())
