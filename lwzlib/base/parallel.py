"""Arguments for TRL's trainers that follow from where a recipe runs: gradient accumulation, DeepSpeed ZeRO, vLLM."""

import os

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
            "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
