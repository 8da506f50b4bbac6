"""The names of vLLM's arguments, so that a typo is found without importing vLLM.

Taken from vLLM 0.32. A name that is not here is looked up in the source text of the installed vLLM before it is
refused, so a newer vLLM keeps its new arguments.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Final


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


ENGINE: Final = _names("""
    additional_config aggregate_engine_logging all2all_backend allow_deprecated_quantization
    allowed_local_media_path allowed_media_domains async_scheduling attention_backend attention_config
    aux_output_config block_size code_revision collect_detailed_traces compilation_config config_format
    convert cp_kv_cache_interleave_size cpu_distributed_timeout_seconds cpu_offload_gb cpu_offload_params
    cudagraph_capture_sizes cudagraph_metrics custom_histogram_buckets data_parallel_address
    data_parallel_backend data_parallel_external_lb data_parallel_hybrid_lb
    data_parallel_multi_port_external_lb data_parallel_rank data_parallel_rpc_port data_parallel_size
    data_parallel_size_local data_parallel_start_rank dbo_decode_token_threshold dbo_prefill_token_threshold
    dcp_comm_backend dcp_kv_cache_interleave_size dcp_q_replicate decode_context_parallel_size
    default_mm_loras device_ids diffusion_config disable_cascade_attn disable_chunked_mm_input
    disable_custom_all_reduce disable_hybrid_kv_cache_manager disable_log_stats
    disable_nccl_for_dp_synchronization disable_sliding_window distributed_executor_backend
    distributed_timeout_seconds download_dir dp_sync_interval dtype ec_manager_config ec_transfer_config
    elastic_ep_max_dp_size enable_batch_sharded_sampling enable_chunked_prefill enable_cumem_allocator
    enable_dbo enable_elastic_ep enable_ep_weight_filter enable_eplb enable_expert_parallel
    enable_fault_tolerance enable_flashinfer_autotune enable_hc_sp enable_layerwise_nvtx_tracing
    enable_log_requests enable_logging_iteration_details enable_lora enable_mamba_cache_stochastic_rounding
    enable_mamba_shared_prefix_checkpoint enable_mfu_metrics enable_mixed_moe_lora_format enable_mm_embeds
    enable_mm_processor_stats enable_moe_shared_loras enable_nccl_comm_suspend enable_prefix_caching
    enable_prompt_embeds enable_return_routed_experts enable_shm_tensor_arena enable_sleep_mode
    enable_tower_connector_lora enable_trace_replay enforce_eager engram_config eplb_config
    expert_placement_strategy fail_on_environ_validation fault_tolerance_config fully_sharded_loras
    gdn_prefill_backend generation_config gpu_memory_utilization hf_config_path hf_overrides hf_token
    ignore_patterns interleave_mm_strings io_processor_plugin ir_op_priority jit_monitor_mode
    jit_monitor_verbose kda_decode_backend kda_prefill_backend kernel_config kv_cache_dtype
    kv_cache_dtype_skip_layers kv_cache_memory_bytes kv_cache_metrics kv_cache_metrics_sample kv_events_config
    kv_offloading_backend kv_offloading_size kv_sharing_fast_prefill kv_transfer_config language_model_only
    limit_mm_per_prompt linear_backend load_format log_config_file log_level logging_config logits_processors
    logprobs_mode long_prefill_token_threshold long_prefill_token_threshold_adaptive lora_dtype
    lora_target_modules mamba_backend mamba_block_size mamba_cache_dtype mamba_cache_mode
    mamba_cache_philox_rounds mamba_config mamba_ssm_cache_dtype mamba_ssu_algorithm master_addr master_port
    max_cpu_loras max_cudagraph_capture_size max_logprobs max_lora_cls_labels max_lora_rank max_loras
    max_model_len max_num_active_seqs max_num_batched_tokens max_num_queued_reqs max_num_queued_tokens
    max_num_scheduled_tokens max_num_seqs max_parallel_loading_workers media_io_kwargs mm_device_do_normalize
    mm_encoder_attn_backend mm_encoder_attn_dtype mm_encoder_fp8_scale_path mm_encoder_fp8_scale_save_margin
    mm_encoder_fp8_scale_save_path mm_encoder_only mm_encoder_tp_mode mm_hasher_algorithm mm_ipc_gpu_memory_gb
    mm_processor_cache_gb mm_processor_cache_type mm_processor_device mm_processor_kwargs
    mm_shm_cache_max_object_size_mb mm_tensor_ipc model model_class_overrides model_impl
    model_loader_extra_config model_weights moe_backend nnodes node_rank num_gpu_blocks_override numa_bind
    numa_bind_cpus numa_bind_nodes offload_backend offload_group_size offload_num_in_group offload_params
    offload_prefetch_step optimization_level otlp_traces_endpoint override_generation_config
    per_request_spec_decode_metrics performance_mode pipeline_parallel_size pooler_config
    prefill_context_parallel_size prefill_schedule_interval prefix_cache_retention_interval
    prefix_caching_hash_algo prefix_match_unit profiler_config pt_load_map_location quantization
    quantization_config ray_workers_use_nsight reasoning_config reasoning_parser reasoning_parser_plugin
    renderer_num_workers replayssm_buffer_len return_sampling_mask revision runner safetensors_load_strategy
    safetensors_prefetch_block_size safetensors_prefetch_num_threads scheduler_cls scheduler_reserve_full_isl
    scheduling_policy seed served_model_name show_hidden_metrics_for_version shutdown_timeout
    skip_mm_profiling skip_tokenizer_init sleep_mode_offload_cudagraph sleep_preserve_parameter_names
    sparse_indexer_topk_backend spec_method spec_model spec_tokens specialize_active_lora speculative_config
    stream_interval structured_outputs_config swa_bounded_replay tensor_parallel_size tokenizer tokenizer_mode
    tokenizer_revision tokens_only trust_remote_code ubatch_size use_fp64_gumbel use_replayssm
    use_tqdm_on_load video_pruning_method video_pruning_rate watermark watermark_config weight_transfer_config
    worker_cls worker_extension_cls
""")
"""Fields of ``AsyncEngineArgs``."""

FRONTEND: Final = _names("""
    anthropic_disabled_thinking_effort chat_template chat_template_content_format cohere_format
    cohere_is_reasoning_model default_chat_template_kwargs enable_auto_tool_choice enable_force_include_usage
    enable_log_deltas enable_log_outputs enable_per_request_metrics enable_prompt_tokens_details
    enable_scale_out enable_server_load_tracking enable_tokenizer_info_endpoint
    exclude_tools_when_tool_choice_none fingerprint_mode fingerprint_value log_error_stack lora_modules
    max_log_len response_role return_tokens_as_token_ids sse_keep_alive_interval tool_call_parser
    tool_parser_plugin tool_server tool_strict_level trust_request_chat_template trust_request_mm_kwargs
""")
"""Fields of ``BaseFrontendArgs``: what vLLM's OpenAI server takes beside the engine's arguments."""

SERVER: Final = _names("""
    allow_credentials allowed_headers allowed_methods allowed_origins api_key data_parallel_supervisor_port
    disable_access_log_for_endpoints disable_fastapi_docs disable_uvicorn_access_log
    dp_supervisor_probe_failure_threshold dp_supervisor_probe_interval_s dp_supervisor_probe_timeout_s
    enable_flash_late_interaction enable_offline_docs enable_request_id_headers enable_ssl_refresh grpc_port
    h11_max_header_count h11_max_incomplete_event_size host middleware port root_path ssl_ca_certs
    ssl_cert_reqs ssl_certfile ssl_ciphers ssl_keyfile uds uvicorn_log_level
""")
"""Fields of ``FrontendArgs`` alone: addresses, keys and certificates, which are not one model's business."""

MOVED: Final = {
    "model": "is set by engine_config.hf_model_id (or model_id)",
    "served_model_name": "is set by engine_config.model_id",
    "tensor_parallel_size": "is set by scaling_config.num_workers",
    "max_model_len": "is set by engine_config.max_total_tokens",
    "tokenizer": "is set by engine_config.tokenizer_id",
    "revision": "is set by engine_config.revision",
    "chat_template": "is set by engine_config.generation.chat_template (or prompt_format)",
}
"""Arguments that have a key of their own."""

REMOVED: Final = {
    "swap_space": "vLLM recomputes preempted requests instead of swapping them to the CPU",
    "worker_use_ray": "the plan decides where workers run",
    "engine_use_ray": "the engine runs inside its Ray Serve replica",
    "max_paddings": "vLLM pads nothing since its attention kernels take ragged batches",
}
"""Arguments of RayLLM's vLLM that have no successor and can be dropped without loss."""

LORA_RANKS: Final = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for ``max_lora_rank``."""

SINGLE: Final = {
    "pipeline_parallel_size": "pipeline",
    "data_parallel_size": "data",
    "decode_context_parallel_size": "context",
    "prefill_context_parallel_size": "context",
}
"""Kinds of parallelism that no plan places workers for."""


def engine_argument_problem(name: str) -> tuple[str, str]:
    """What is wrong with `name` as a key of ``engine_kwargs``, and the fix; empty texts when nothing is."""
    if name == "hf_token":
        return "a secret would be shown by `plan` and kept by Ray", "set HF_TOKEN in the environment"
    if name in MOVED:
        return f"{name} {MOVED[name]}", "move the value there"
    if name in FRONTEND - ENGINE:
        return f"{name} is an argument of vLLM's server, not of its engine", "move it to engine_config.frontend_kwargs"
    if name in ENGINE or name in _installed():
        return "", ""
    close = get_close_matches(name, ENGINE - set(MOVED), n=3, cutoff=0.7)
    if not close and not _installed():
        return "", ""
    hint = f"; did you mean {' or '.join(f'`{match}`' for match in close)}?" if close else ""
    return f"vLLM has no engine argument `{name}`{hint}", ""


def unverifiable(name: str) -> bool:
    """Whether nothing on this machine can tell if `name` is an engine argument."""
    return name not in ENGINE and not _installed()


def frontend_argument_problem(name: str) -> tuple[str, str]:
    """What is wrong with `name` as a key of ``frontend_kwargs``, and the fix; empty texts when nothing is."""
    if name in MOVED:
        return f"{name} {MOVED[name]}", "move the value there"
    if name in SERVER:
        return f"{name} belongs to the server all models share", "use `http:` of the app file or options of `serve`"
    if name in FRONTEND:
        return "", ""
    close = get_close_matches(name, FRONTEND, n=1, cutoff=0.6)
    hint = f"; did you mean `{close[0]}`?" if close else ""
    return f"vLLM's server has no argument `{name}`{hint} (known: {', '.join(sorted(FRONTEND))})", ""


@cache
def _installed() -> frozenset[str]:
    """Engine arguments of the vLLM on this machine, read from its source without importing it."""
    spec = find_spec("vllm")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        try:
            text = (Path(folder) / "engine" / "arg_utils.py").read_text(encoding="utf-8")
        except OSError:
            continue
        return frozenset(re.findall(r"^    ([a-z][a-z0-9_]*): ", text, re.MULTILINE))
    return frozenset()
