"""Models that both vLLM and transformers run, and what transformers makes of them with StepFlow."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hf_stepflow import StepFlowModelForCausalLM
from hf_stepflow.reasoner import FOLDER
from hf_stepflow.reasoner.levels import problems_of

# Strong enough that log probabilities tell whether it acts.
SETTINGS: dict[str, Any] = {"tau_max": 0.3, "oeb_layers": [0, 1, 2], "alpha": 0.3, "smi_layers": [5, 6, 7]}
TINY = SETTINGS | {"oeb_layers": [0, 1], "smi_layers": [1, 2], "alpha": 1.0, "tau_max": 0.6}

_COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
}
# Model types of transformers, with the fields that make each of them itself.
TINY_MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"head_dim": 16 * 2, "num_attention_heads": 2, "num_key_value_heads": 1},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1},
    "mistral": {"sliding_window": None},
    "phi3": {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0},
    "gemma3_text": {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}


def make_tiny(model_type: str, folder: Path) -> Path:
    """Saves a random model of a type, with the reasoner's tokenizer."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    fields = _COMMON | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = AutoConfig.for_model(model_type, **fields | TINY_MODELS[model_type])
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:  # else the next token hardly depends on what is read
                parameter.mul_(3 if "embed" not in name else 1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@lru_cache
def prompts(level: str, number: int, thinking: float = 0.0) -> tuple[tuple[int, ...], ...]:
    """Prompts of the reasoner, with a share of the right thinking after them."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    found = []
    for problem in problems_of(level, "test", number):
        message = [{"role": "user", "content": problem.question}]
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=True, return_dict=False)
        response = tokenizer.encode(problem.response, add_special_tokens=False)
        found.append((*ids, *response[: int(thinking * len(response))]))
    return tuple(found)


def expected(
    folder: Any, asked: Any, settings: Any, max_tokens: int, dtype: str = "float32"
) -> list[dict[str, list[Any]]]:
    """Transformers' greedy answers, one by one, as `run_engine` returns them.

    Args:
        folder: Folder of the model.
        asked: Prompts, token ids.
        settings: StepFlow's settings, or False for the base model.
        max_tokens: Tokens to generate.
        dtype: Of the weights.
    """
    model = StepFlowModelForCausalLM.from_pretrained(folder, stepflow=settings or None, dtype=dtype).eval()
    with torch.no_grad():
        return [_answer(model, list(ids), max_tokens, **({} if settings else {"stepflow": False})) for ids in asked]


def _answer(model: Any, ids: list[int], max_tokens: int, **kwargs: Any) -> dict[str, list[Any]]:
    output = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=max_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **kwargs,
    )
    made = output.sequences[0, len(ids) :].tolist()
    logprobs = [step[0].float().log_softmax(-1)[token].item() for step, token in zip(output.logits, made, strict=True)]
    with model.use_stepflow(kwargs.get("stepflow")):
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, :-1].float().log_softmax(-1)
    prompt = logits.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    return {"ids": made, "logprobs": logprobs, "prompt_logprobs": prompt}
