"""The fields of TRL's GRPOConfig, each in one of three tables: set by a quantity of the recipe, refused, or free in `grpo.trl`.

A recipe loads without TRL, which takes seconds to import, so names and types stand here; a test holds them against the class
that is installed. One generation is one step, so each ratio of probabilities is 1, and the bounds of clipping (`epsilon_high`,
`delta`) cut nothing. The paper names no field of TRL.
"""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

SET = {  # by which quantity of the recipe
    "max_steps": "grpo.steps", "num_train_epochs": "grpo.steps", "learning_rate": "grpo.learning_rate",
    "lr_scheduler_type": "grpo.lr_schedule", "warmup_steps": "grpo.warmup_steps", "max_grad_norm": "grpo.max_grad_norm",
    "loss_type": "grpo.loss", "epsilon": "grpo.clip_eps", "beta": "grpo.kl_beta",
    "use_bias_correction_kl": "grpo.kl_bias_correction", "scale_rewards": "grpo.advantage",
    "multi_objective_aggregation": "grpo.advantage", "reward_weights": "reward.weights",
    "num_generations": "grpo.group_size", "per_device_train_batch_size": "grpo.micro_batch_completions",
    "gradient_accumulation_steps": "grpo.queries_per_step", "generation_batch_size": "grpo.queries_per_step",
    "temperature": "grpo.sampling.temperature", "top_p": "grpo.sampling.top_p",
    "max_completion_length": "grpo.sampling.max_new_tokens", "vllm_max_model_length": "grpo.sampling.max_new_tokens",
    "generation_kwargs": "grpo.stop", "vllm_importance_sampling_mode": "grpo.importance_sampling",
    "use_vllm": "vllm.mode", "vllm_mode": "vllm.mode", "vllm_server_base_url": "vllm.mode", "vllm_server_host": "vllm.mode",
    "vllm_server_port": "vllm.mode", "vllm_group_port": "vllm.mode", "vllm_tensor_parallel_size": "vllm.tensor_parallel",
    "vllm_gpu_memory_utilization": "vllm.memory_share", "vllm_enable_sleep_mode": "vllm.sleep",
    "vllm_server_timeout": "distributed.start_s", "deepspeed": "distributed.zero", "fsdp": "distributed.zero",
    "fsdp_config": "distributed.zero", "parallelism_config": "distributed.zero", "accelerator_config": "distributed.zero",
    "bf16": "model.dtype", "fp16": "model.dtype", "tf32": "model.dtype", "bf16_full_eval": "model.dtype",
    "fp16_full_eval": "model.dtype", "model_init_kwargs": "model.attention", "trust_remote_code": "model.trust_remote_code",
    "gradient_checkpointing": "grpo.gradient_checkpointing", "save_strategy": "grpo.checkpoint_every_steps",
    "save_steps": "grpo.checkpoint_every_steps", "log_completions": "grpo.kept_completions_per_step",
    "num_completions_to_print": "grpo.kept_completions_per_step", "log_unique_prompts": "grpo.kept_completions_per_step",
    "report_to": "tracking.report_to", "mask_truncated_completions": "grpo.mask_truncated",
}

REFUSED = {field: reason for reason, fields in {  # what would break, or would do nothing
    "the run sets it (its folder, its seed, its device, how its processes wait)":
        "output_dir seed use_cpu ddp_timeout ddp_find_unused_parameters ddp_backend local_rank log_on_each_node",
    "the kit writes one row and prints one line per step, in its own form":
        "logging_steps logging_strategy logging_first_step logging_nan_inf_filter disable_tqdm log_level log_level_replica "
        "include_num_input_tokens_seen skip_memory_metrics",
    "trackers get their names from the run; `tracking.report_to` chooses them":
        "run_name project trackio_space_id trackio_bucket_id trackio_static_space_id",
    "the rewards read columns of the queries that TRL would drop": "remove_unused_columns",
    "checkpoints must stay whole, two of them, or a run could not resume":
        "save_total_limit save_only_model save_on_each_node resume_from_checkpoint ignore_data_skip enable_jit_checkpoint "
        "restore_callback_states_from_checkpoint load_best_model_at_end metric_for_best_model greater_is_better",
    "one generation is one step here: with several steps for one, some rows would have no rewards, and a run could resume "
    "only where a generation begins": "num_iterations steps_per_generation",
    "the reference model is in no checkpoint: a resumed run would begin with another":
        "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps",
    "micro-batches differ in their columns: each would be compiled anew":
        "torch_compile torch_compile_backend torch_compile_mode",
    "the queries lie in memory: there is nothing to load ahead":
        "dataloader_num_workers dataloader_prefetch_factor dataloader_persistent_workers dataloader_multiprocessing_context "
        "dataloader_drop_last dataloader_pin_memory dataloader_in_order",
    "it belongs to an optimiser that `optim` does not have here": "optim_target_modules",
    "micro-batches are cut to the columns they need, so padding would be undone": "pad_to_multiple_of",
    "its noise is not the same when completions are written and when they are trained on": "neftune_noise_alpha",
    "TRL gives it up: use what it names instead":
        "use_liger_kernel liger_kernel_config use_transformers_paged vllm_importance_sampling_cap",
    "TRL refuses it, or GRPO needs whole groups": "auto_find_batch_size",
    "it belongs to a loss that `grpo.loss` does not have":
        "sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg",
    "the kit uploads nothing":
        "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision "
        "log_completions_hub_repo",
    "nothing in the kit's GRPO reads it":
        "do_train do_eval do_predict eval_strategy eval_steps eval_delay per_device_eval_batch_size prediction_loss_only "
        "eval_on_start eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics "
        "batch_eval_metrics num_generations_eval label_names label_smoothing_factor data_seed train_sampling_strategy "
        "length_column_name chat_template_kwargs max_tool_calling_iterations log_multimodal use_cache debug",
}.items() for field in fields.split()}

_Share, _Above0, _From0 = Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(gt=0)], Annotated[float, Field(ge=0)]
FREE: dict[str, Any] = {  # what `grpo.trl` takes
    "importance_sampling_level": Literal["token", "sequence"],
    "optim": Literal["adamw_torch", "adamw_torch_fused", "adafactor", "sgd"],
    "vllm_model_impl": Literal["auto", "vllm", "transformers"],
    "cache_implementation": Literal["dynamic", "static", "offloaded"] | None,
    **dict.fromkeys(("epsilon_high", "delta", "off_policy_mask_threshold", "vllm_importance_sampling_clip_min"),
                    _Above0 | None),
    **dict.fromkeys(("adam_epsilon", "repetition_penalty", "vllm_importance_sampling_clip_max"), _Above0),
    **dict.fromkeys(("weight_decay", "entropy_coef_delta", "entropy_coef_max", "entropy_target"), _From0),
    **dict.fromkeys(("entropy_coef", "entropy_coef_min"), float),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "top_entropy_quantile"), _Share),
    **dict.fromkeys(("min_p",), _Share | None), **dict.fromkeys(("router_aux_loss_coef",), _From0 | None),
    "top_k": Annotated[int, Field(ge=0)],
    **dict.fromkeys(("torch_empty_cache_steps", "ddp_bucket_cap_mb"), Annotated[int, Field(ge=1)] | None),
    **dict.fromkeys(("optim_args", "vllm_structured_outputs_regex"), str | None),
    **dict.fromkeys(("lr_scheduler_kwargs", "gradient_checkpointing_kwargs", "transformers_continuous_batching_config"),
                    dict[str, Any] | None),
    **dict.fromkeys(("ddp_broadcast_buffers", "ddp_static_graph"), bool | None),
    **dict.fromkeys(("average_tokens_across_devices", "cast_lm_head_to_fp32", "disable_dropout", "ds3_gather_for_generation",
                     "full_determinism", "shuffle_dataset", "use_adaptive_entropy", "use_transformers_continuous_batching",
                     "vllm_importance_sampling_correction"), bool),
}
FIELDS = SET.keys() | REFUSED.keys() | FREE.keys()


def problem(field: str, value: Any) -> str:
    """What is wrong with a field of `FIELDS` in `grpo.trl`; "" if nothing."""
    if field in SET:
        return f"the recipe has it as {SET[field]}"
    if field in REFUSED:
        return f"refused: {REFUSED[field]}"
    try:
        TypeAdapter(FREE[field], config=ConfigDict(strict=True, allow_inf_nan=False)).validate_python(value)
    except ValidationError as error:
        return "; ".join(dict.fromkeys(wrong["msg"] for wrong in error.errors()))
    return ""
