"""A zoo of tiny, randomly initialised decoder-only language models, one per causal model type of transformers.

The configs are derived from the default config of each model type: every field whose name is known gets a small value,
per-layer lists are cut to four layers in a way that keeps every kind of layer, and the few families that need more get
it from `EXCEPTIONS`.
"""

import inspect
import logging
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

NUM_LAYERS = 4
SLIDING_WINDOW = 16
# For image, audio and other marker tokens: outside of 5..319, from which tests draw text.
EXTRA_TOKEN_ID = 3
# The standard deviation of the elements of a query or key whose input has unit variance.
PROJECTION_GAIN = 1.2

# The names of config fields, over all model types, by the value that they get. An initializer range of 0.1 is near
# 1 / sqrt(hidden size), so that every sublayer contributes about as much as the residual stream carries.
FIELDS_BY_VALUE: dict[Any, str] = {
    320: """vocab_size vocab_size_per_layer_input decoder_vocab_size audio_vocab_size unpadded_vocab_size
        pronunciation_vocab_size shape_vocab_size encoder_hash_byte_group_vocab ngram_vocab_size_base""",
    512: "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions context_length",
    128: """intermediate_size n_inner ffn_dim ffn_hidden_size dff dim_ff d_inner feed_forward_size mlp_dim
        encoder_ffn_dim decoder_ffn_dim intermediate_size_mlp dense_intermediate_size shared_intermediate_size
        mamba_d_ssm""",
    64: """hidden_size d_model n_embd emb_dim embedding_dim embedding_size input_embedding_size output_embedding_size
        word_embed_proj_dim lru_width moe_intermediate_size shared_expert_intermediate_size
        shared_experts_intermediate_size expert_ffn_hidden_size moe_shared_expert_intermediate_size router_hidden_size
        dim_model_base pronunciation_embed_dim shape_embed_dim hidden_size_global out_hidden_size
        output_channels adapter_in_dim adapter_out_dim adapter_input_size ple_embed_dim""",
    32: """kv_lora_rank q_lora_rank o_lora_rank adapter_rank attention_head_dim index_head_dim image_size crop_size
        ext_pw_out_channel depthwise_separable_out_channel nemo_conv_channels""",
    16: """head_dim dim_head d_head attention_head_size kv_channels qk_nope_head_dim qk_rope_head_dim v_head_dim
        swa_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim mamba_d_head
        mamba_head_dim mamba_d_state state_size ssm_state_size query_pre_attn_scalar hidden_size_per_layer_input
        laurel_rank hc_lowrank mamba_dt_rank index_topk chunk_size mamba_chunk_size block_size patch_size
        attention_window_size local_attention window_size attention_chunk_size""",
    8: "mamba_n_heads mamba_num_heads n_mamba_heads",
    4: """num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers num_blocks
        num_encoder_layers num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads
        encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads
        linear_num_heads linear_num_value_heads index_n_heads n_routed_experts num_experts num_local_experts
        moe_num_experts rotary_dim zero_expert_num depth index_block_size""",
    2: """num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads linear_num_key_heads num_experts_per_tok
        moe_topk moe_top_k moe_k top_k_experts attn_layer_period index_topk_blocks""",
    1: "n_group topk_group n_shared_experts first_k_dense_replace num_dense_layers attn_layer_offset",
    0.25: "attention_multiplier",
    0.1: "initializer_range init_std",
}
TINY_FIELDS = {name: value for value, names in FIELDS_BY_VALUE.items() for name in names.split()}
TEXT_TOKEN_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Fields that change only where the default has a value.
OTHER_TOKEN_ID = re.compile(r"token_(id|index)$")
DROPOUT = re.compile(r"drop|_jitter")
SLIDING_WINDOW_FIELDS = ("sliding_window", "sliding_window_size")
KINDS_PER_LAYER = ("layer_types", "mlp_layer_types", "indexer_types", "layers_block_type")

HYBRID_LAYERS = ["linear_attention", "full_attention"] * 2
SHARED_LAYERS = ["linear_attention", "hybrid"] * 2
CONVOLUTION_LAYERS = ["conv", "full_attention"] * 2
SPARSE_INDEX = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16}
DOTS3_SLIDING = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 32,
    "swa_kv_lora_rank": 32,
    "swa_head_dim": 32,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 16,
}
# What the rules above do not give: settings that hang together, and layers of two kinds where the default has one.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"num_hidden_layers": 4},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
        }
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dots3_note": DOTS3_SLIDING,
    "dots3_note_text": DOTS3_SLIDING,
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2},
    "gemma4": {"global_head_dim": 32},
    "gemma4_text": {"global_head_dim": 32},
    "gemma4_unified": {"global_head_dim": 32},
    "gemma4_unified_text": {"global_head_dim": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": HYBRID_LAYERS},
    "lfm2": {"layer_types": CONVOLUTION_LAYERS},
    "lfm2_moe": {"layer_types": CONVOLUTION_LAYERS},
    "longcat_flash": {"num_layers": 2},
    "mamba2": {"num_heads": 8},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
    "qwen4_exp": {**SPARSE_INDEX, "indexer_compress_ratio": 4},
    "qwen4_exp_text": {**SPARSE_INDEX, "indexer_compress_ratio": 4},
    "reformer": {"hash_seed": 0, "axial_pos_embds": False, "local_attn_chunk_length": 16, "lsh_attn_chunk_length": 16},
    "xlm": {"causal": True},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": SHARED_LAYERS},
    "zamba2": {"layers_block_type": SHARED_LAYERS},
    "zaya": {"num_experts_per_tok": 1},
}

UNBUILDABLE: dict[str, str] = {
    "gemma3n": "its vision tower needs the timm package",
    "gemma4_assistant": "a drafting head that reads the hidden states and the cache of another model",
    "gemma4_unified_assistant": "a drafting head that reads the hidden states and the cache of another model",
    "musicgen": "its causal model reads audio codes, and its config is that of the whole speech model",
    "musicgen_melody": "its causal model reads audio codes, and its config is that of the whole speech model",
}

QUERY_OR_KEY = re.compile(r"(^|[._])w?(q|k|kv|qk|qkv|qkvz|query|key|c_attn)([._]|$)", re.IGNORECASE)


def causal_model_types() -> list[str]:
    """Returns the sorted model types of the installed transformers that have a causal language model."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str, **overrides: Any) -> PretrainedConfig:
    """Builds a tiny config of a model type.

    Args:
        model_type: A model type of `causal_model_types()`.
        **overrides: Fields that take precedence over the tiny ones. A field that a composite config lacks is set in
            its `text_config`.

    Returns:
        A config of four layers, hidden size 64, vocabulary 320, with pad, bos and eos ids 0, 1 and 2.
    """
    config_class = CONFIG_MAPPING[model_type]
    with _quiet_transformers():
        config = config_class(**_tiny_fields(config_class, EXCEPTIONS.get(model_type, {}) | overrides))
        if hasattr(config, "_experts_implementation"):
            config._experts_implementation = "eager"
    return config


def tiny_model(
    model_type: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """Builds a tiny random model of a model type, in evaluation mode, with attention that is far from uniform.

    Args:
        model_type: A model type of `causal_model_types()` that is not in `UNBUILDABLE`.
        seed: The seed of the random weights; the global random state is left as it was.
        dtype: The dtype of the weights.
        **overrides: Config fields, as in `tiny_config`.

    Returns:
        The model, on the CPU.
    """
    config = tiny_config(model_type, **overrides)
    with torch.random.fork_rng(devices=[]), _quiet_transformers():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        _sharpen_attention(model)
    return model.eval()


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hides what transformers logs about configs no checkpoint has, and the deprecations its modules import."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)


def _tiny_fields(config_class: type[PretrainedConfig], extra: dict[str, Any]) -> dict[str, Any]:
    """Computes the constructor arguments of a tiny config.

    Args:
        config_class: The config class.
        extra: Fields that take precedence over the general rules. Those the class lacks go to its `text_config`.

    Returns:
        The arguments.
    """
    defaults = config_class()
    extra = {config_class.attribute_map.get(name, name): value for name, value in extra.items()}
    layer_count = config_class.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    if hasattr(defaults, "text_config"):
        inherited = {name: extra.pop(name) for name in list(extra) if not hasattr(defaults, name)}
        extra["text_config"] = inherited | extra.get("text_config", {})
    tiny: dict[str, Any] = dict(TEXT_TOKEN_IDS)
    if hasattr(defaults, "is_decoder"):
        tiny["is_decoder"] = True
    for name in inspect.signature(config_class).parameters:
        default = vars(defaults).get(name)
        if isinstance(default, PretrainedConfig):
            tiny[name] = type(default)(**_tiny_fields(type(default), extra.pop(name, {})))
        elif name in TINY_FIELDS:
            tiny[name] = TINY_FIELDS[name]
        elif default and DROPOUT.search(name) and isinstance(default, float):
            tiny[name] = 0.0
        elif default and OTHER_TOKEN_ID.search(name) and name not in TEXT_TOKEN_IDS:
            tiny[name] = EXTRA_TOKEN_ID
        elif default and name in KINDS_PER_LAYER:
            tiny[name] = _shorten_kinds(default, extra.get(layer_count, NUM_LAYERS))
        elif default and name in SLIDING_WINDOW_FIELDS and _slides(defaults):
            tiny[name] = SLIDING_WINDOW
    if "kv_lora_rank" in tiny and "num_key_value_heads" in tiny:
        tiny["num_key_value_heads"] = extra.get("num_attention_heads", tiny["num_attention_heads"])
    return tiny | extra


def _slides(config: PretrainedConfig) -> bool:
    """Whether some layer of a config has a sliding window."""
    return any("sliding" in kind for kind in getattr(config, "layer_types", None) or ())


def _shorten_kinds(kinds: list[str], length: int) -> list[str]:
    """Cuts a list of layer kinds to a length, putting the kinds that would be lost at its end."""
    kept = kinds[:length]
    lost = [kind for kind in dict.fromkeys(kinds) if kind not in kept][:length]
    return kept[: length - len(lost)] + lost


def _sharpen_attention(model: PreTrainedModel) -> None:
    """Scales query and key projections for attention logits of standard deviation near one, and randomises sinks.

    Args:
        model: The model, changed in place.
    """
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if QUERY_OR_KEY.search(name) and weight is not None and weight.dim() == 2:
            fan_in = weight.shape[0] if isinstance(module, Conv1D) else weight.shape[1]
            weight.data *= PROJECTION_GAIN / (math.sqrt(fan_in) * weight.data.float().std().item())
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            parameter.data.normal_()
        elif name.endswith("qk_norm.temp"):
            parameter.data.fill_(1.0)
