"""The settings of a vLLM engine: found, checked and made plain data before any worker starts.

They come from `additional_config={"stepflow": ...}`, or from MODEL itself: a preset repository, whose base model is
then served, or a folder that was saved with StepFlow. Workers get the resolved settings in the same place, as JSON
data.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging

from hf_stepflow.runtime.configuration_stepflow import (
    StepFlowConfig,
    base_of,
    read_repository_file,
    read_settings,
    settings_from_data,
)
from hf_stepflow.runtime.errors import StepFlowInputError, StepFlowUnsupportedError
from hf_stepflow.runtime.repository import find_preset, is_saved_with_stepflow, settings_for
from hf_stepflow.runtime.settings import FlowPlan, StepFlowSettings
from hf_stepflow.runtime.step_detector import StepVocabulary
from hf_stepflow.runtime.tokenization_stepflow import load_base_tokenizer

from .counters import Counters
from .requests import FIELD, EngineSettings

logger = logging.get_logger(__name__)

REQUESTS = "stepflow_requests"
_COUNTERS = "stepflow_counters"


@dataclass
class Asked:
    """The StepFlow arguments of an engine.

    Attributes:
        source: The settings, as `stepflow` of `StepFlowModelForCausalLM.from_pretrained`; None for those of MODEL, and
            False for none where requests bring theirs.
        of_model: Settings that MODEL brings, or None.
    """

    source: Any
    of_model: StepFlowSettings | None


def read_arguments(args: Any) -> Asked | None:
    """Reads what an engine is asked for, and puts the base model where MODEL is a preset repository.

    Args:
        args: The `EngineArgs`, which are changed in place.

    Returns:
        None where StepFlow is not asked for.

    Raises:
        StepFlowError: There is no such preset, or it names no base model.
    """
    given = dict(args.additional_config or {})
    source, takes_requests = given.get(FIELD), given.get(REQUESTS, False)
    if isinstance(source, int | float | list) and source is not False:
        raise StepFlowInputError(
            f'{FIELD!r} of additional_config is {source!r}, expected a preset\'s name, Hub id or path, "auto", an '
            "object of settings, or false",
            hint='for instance --additional-config \'{"stepflow": "auto"}\'',
        )
    if not isinstance(takes_requests, bool):
        raise StepFlowInputError(f"{REQUESTS!r} of additional_config is {takes_requests!r}, expected true or false")
    if source is False and not takes_requests:
        return None
    where = {"revision": args.revision, "token": args.hf_token if isinstance(args.hf_token, str) else None}
    data = read_repository_file(args.model, "config.json", where)
    of_model = None
    if data.get("model_type") == "stepflow":
        config = StepFlowConfig.from_dict(dict(data))
        of_model = settings_from_data(data, str(args.model))
        base, revision = base_of(config, args.model)
        if args.tokenizer in (None, args.model):
            args.tokenizer, args.tokenizer_revision = base, revision
        if args.served_model_name is None:
            args.served_model_name = args.model
        args.model, args.revision = base, revision
    elif is_saved_with_stepflow(data):
        stored = read_repository_file(args.model, "generation_config.json", where).get("stepflow")
        of_model = settings_from_data(stored, "generation_config.stepflow") if isinstance(stored, dict) else None
    if of_model is None and source is None:
        source = False
    found = find_preset(source)
    lock = getattr(found, "lock", None)
    if lock is not None:
        if args.revision is None:
            args.revision = args.tokenizer_revision = lock.base_revision
        lock.check_base(args.model, args.revision)
    return Asked(found, of_model) if source is not False or takes_requests else None


def resolve(asked: Asked, vllm_config: Any) -> None:
    """Checks the settings of an engine against its model, tokenizer and modes, and puts them into its config.

    Args:
        asked: What it was asked for.
        vllm_config: Its config.

    Raises:
        StepFlowError: They do not fit the model or its tokenizer, or vLLM runs in a mode that StepFlow cannot follow.
    """
    _check_modes(vllm_config)
    _capture_in_pieces(vllm_config)
    settings = None if asked.source is False else _settings_for(asked.source, asked.of_model, vllm_config)
    if settings is not None:
        check_settings(settings, vllm_config)
        vocabulary_of(settings, vllm_config)
    found = {
        FIELD: False if settings is None else settings.to_dict(),
        _COUNTERS: Counters.create(vllm_config.parallel_config.data_parallel_size),
    }
    vllm_config.additional_config = (vllm_config.additional_config or {}) | found


def _settings_for(source: Any, of_model: StepFlowSettings | None, vllm_config: Any) -> StepFlowSettings:
    """The settings that a source means for the engine's model."""
    if of_model is not None and (source is None or isinstance(source, dict)):
        return of_model.replace(**(source or {}))
    return settings_for(source, vllm_config.model_config.hf_config)[0]


def check_settings(settings: StepFlowSettings, vllm_config: Any) -> None:
    """Checks layers and heads as far as the model's config tells; the worker knows better, but later.

    Raises:
        StepFlowConfigError: The settings name layers or heads that the model does not have.
    """
    text = vllm_config.model_config.hf_text_config
    heads, layers = getattr(text, "num_attention_heads", None), getattr(text, "num_hidden_layers", None)
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * (layers or 0)
    if type(heads) is int and layers is not None and all(kind.endswith("_attention") for kind in kinds):
        FlowPlan.resolve(settings, dict.fromkeys(range(layers), heads))


def settings_in(vllm_config: Any) -> EngineSettings | None:
    """The resolved settings of an engine; None where it runs without StepFlow."""
    data = vllm_config.additional_config or {}
    if _COUNTERS not in data:
        return None
    return EngineSettings(read_settings(data[FIELD]) if data[FIELD] else None, data.get(REQUESTS, False))


def counters_in(vllm_config: Any, row: int) -> Counters | None:
    """The counts of an engine, for the process that adds to a row; None where their file is not at hand.

    Workers on other machines than the front end have none.
    """
    path = (vllm_config.additional_config or {}).get(_COUNTERS)
    return Counters(path, row) if path is not None and Path(path).is_file() else None


def vocabulary_of(settings: StepFlowSettings, vllm_config: Any) -> StepVocabulary:
    """The step rules for an engine's tokenizer.

    Raises:
        StepFlowConfigError: The tokenizer cannot be loaded, or cannot write a marker.
    """
    model = vllm_config.model_config
    tokenizer = load_base_tokenizer(
        model.tokenizer, model.tokenizer_revision, trust_remote_code=model.trust_remote_code
    )
    ends: set[int] = set()
    generation = model.try_get_generation_config() or {}
    for ids in (
        generation.get("eos_token_id"), getattr(model.hf_config, "eos_token_id", None), tokenizer.eos_token_id
    ):  # fmt: skip
        ends |= set(ids if isinstance(ids, list | tuple) else [] if ids is None else [ids])
    return StepVocabulary.from_tokenizer(tokenizer, settings, end_of_turn_ids=sorted(ends))


def _check_modes(vllm_config: Any) -> None:
    """Refuses what StepFlow cannot follow, with what to do instead."""
    parallel, model, cache = vllm_config.parallel_config, vllm_config.model_config, vllm_config.cache_config
    refusals = [
        (model.runner_type != "generate", f"the runner {model.runner_type!r}", "StepFlow acts on generation only"),
        (model.use_mla, "latent attention (MLA)", "run this model in transformers"),
        (model.is_encoder_decoder, "an encoder-decoder model", "StepFlow is for decoder-only models"),
        (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
            "context parallelism",
            "set --decode-context-parallel-size 1 and use --tensor-parallel-size",
        ),
        (
            parallel.pipeline_parallel_size > 1,
            "pipeline parallelism",
            "set --pipeline-parallel-size 1 and use --tensor-parallel-size",
        ),
        (getattr(parallel, "enable_dbo", False), "dual batch overlap", "leave --enable-dbo out"),
        (model.enable_prompt_embeds, "prompts as embeddings", "leave --enable-prompt-embeds out: steps are token ids"),
        (cache.cache_dtype != "auto" and not _is_plain(cache.cache_dtype), f"a cache in {cache.cache_dtype}",
         "set --kv-cache-dtype auto"),
        (getattr(cache, "kv_sharing_fast_prefill", False), "fast prefill by shared keys",
         "leave --kv-sharing-fast-prefill out"),
        (
            vllm_config.kv_transfer_config is not None,
            "a KV connector",
            "leave --kv-transfer-config out: it is not known to move StepFlow's records",
        ),
        (
            bool(getattr(vllm_config.compilation_config.pass_config, "fuse_attn_quant", False)),
            "attention fused with quantisation of its output",
            "set pass_config.fuse_attn_quant to false",
        ),
        (
            vllm_config.use_v2_model_runner,
            "Model Runner V2",
            "leave VLLM_USE_V2_MODEL_RUNNER out, or what turns it on (watermarks, HiSparse)",
        ),
    ]  # fmt: skip
    for is_refused, what, instead in refusals:
        if is_refused:
            raise StepFlowUnsupportedError(f"StepFlow in vLLM does not run with {what}", hint=instead)


def _capture_in_pieces(vllm_config: Any) -> None:
    """Keeps CUDA graphs to the pieces between attention: a graph of everything would replay it without StepFlow."""
    from vllm.config import CompilationMode, CUDAGraphMode

    compilation = vllm_config.compilation_config
    mode = compilation.cudagraph_mode
    if mode is None or not mode.has_full_cudagraphs():
        return
    has_pieces = compilation.mode == CompilationMode.VLLM_COMPILE
    compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE if has_pieces else CUDAGraphMode.NONE
    logger.warning("StepFlow: cudagraph_mode is %s instead of %s", compilation.cudagraph_mode.name, mode.name)


def choose_runner() -> None:
    """Chooses Model Runner V1 where nobody has chosen: StepFlow is put on that one."""
    if os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0") == "0":
        logger.info("StepFlow: VLLM_USE_V2_MODEL_RUNNER=0")


def _is_plain(dtype: Any) -> bool:
    return str(dtype) in ("float16", "bfloat16", "float32")
