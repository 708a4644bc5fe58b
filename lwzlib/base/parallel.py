"""What follows from where a recipe runs: gradient accumulation, DeepSpeed ZeRO, vLLM; and work dealt out over processes."""

import os
from collections.abc import Callable, Sequence

from lwzlib.base.recipe import Recipe
from lwzlib.base.rows import RunError

URL, _PORT = "LWZ_VLLM_URL", "LWZ_VLLM_PORT"  # what the servers tell the ranks


def vllm_arguments(recipe: Recipe) -> dict:
    """vLLM's part of TRL's GRPOConfig. Raises RunError where the recipe wants servers and none were started."""
    vllm = recipe.vllm
    if vllm.mode == "none":
        return {}
    if vllm.mode == "colocate":
        return {"use_vllm": True, "vllm_mode": "colocate", "vllm_tensor_parallel_size": vllm.tensor_parallel,
                "vllm_gpu_memory_utilization": vllm.memory_share, "vllm_enable_sleep_mode": vllm.sleep}
    if URL not in os.environ:
        raise RunError("vllm.mode is server, and no server was started: start the stage with lwzlib.pipeline.launch.launch")
    return {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": os.environ[URL],
            "vllm_group_port": int(os.environ[_PORT]), "vllm_server_timeout": float(recipe.distributed.start_s)}


def context_tokens(prompts: Sequence[str], tokenizer, max_new_tokens: int) -> int:
    """Tokens of the longest prompt with its completion. vLLM keeps room for a whole context, and that of a model may be far
    longer."""
    return max(map(len, tokenizer(list(prompts)).input_ids)) + max_new_tokens


def with_context(args, dataset, tokenizer):
    """The dataset of GRPO, whose longest prompt sets the context of a colocated vLLM in TRL's `args`."""
    args.vllm_max_model_length = context_tokens(dataset["prompt"], tokenizer, args.max_completion_length)
    return dataset


def accumulation(recipe: Recipe, processes: int) -> int:
    """Micro-batches of GRPO per process and step. Raises RunError if the step cannot be cut over the processes."""
    completions, micro = recipe.grpo.group_size * recipe.grpo.queries_per_step, recipe.grpo.micro_batch_completions
    if completions % (micro * processes):
        raise RunError(f"{completions} completions a step cannot be cut into micro-batches of {micro} on {processes} "
                       "processes; change grpo.queries_per_step or grpo.micro_batch_completions")
    return completions // (micro * processes)


def deepspeed_config(recipe: Recipe) -> dict | None:
    """DeepSpeed's configuration; what is "auto" transformers fills in from the trainer's arguments."""
    where = recipe.distributed
    if not where.zero:
        return None
    zero: dict = {"stage": where.zero, "overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": "auto"}
    if where.zero == 3:
        zero |= {"stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto",
                 "stage3_gather_16bit_weights_on_model_save": True}
    for part, offloaded in (("optimizer", where.offload != "none"), ("param", where.offload == "all")):
        if offloaded:
            zero[f"offload_{part}"] = {"device": "cpu", "pin_memory": True}
    return {"zero_optimization": zero, "bf16": {"enabled": recipe.model.dtype == "bfloat16"}, "gradient_clipping": "auto",
            "data_types": {"grad_accum_dtype": "fp32"},  # else micro-batches are summed in the weights' dtype
            "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}


def dealt(items: list, do: Callable[[list], list]) -> list:
    """Results of `do`(items), one for each item and in order. Each process does its share; all of them do as many, so the last
    item may be done again: a forward pass of a sharded model is one of all processes at once. Every process must call it."""
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state = PartialState()
    rounds = -(-len(items) // state.num_processes)
    filled = items + items[-1:] * (rounds * state.num_processes - len(items))
    results = gather_object([do(filled[state.process_index :: state.num_processes])])
    return [results[i % state.num_processes][i // state.num_processes] for i in range(len(items))]
