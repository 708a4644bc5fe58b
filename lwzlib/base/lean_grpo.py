"""TRL's GRPOTrainer with the same gradient for less time and memory, and completions that end at a stop string.

Four changes, none of them to the method. TRL pads every micro-batch to the longest completion of the whole step: here the step
is sorted by length, and each micro-batch has the columns that it needs. It asks a vLLM server for a whole step in one request,
so that all GPUs wait until rank 0 has read it: here each prompt is a request. What a stop string has ended is cut
there, and counts as whole where truncated completions are masked: TRL looks for the end-of-text token alone.
"""

import bisect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.nn.functional import pad
from trl import GRPOTrainer

from lwzlib.base.models import restore_rotations
from lwzlib.base.recipe import Recipe


def sampling_arguments(recipe: Recipe) -> dict:
    """Arguments of GRPOConfig for the ends of completions, and for the difference between vLLM's probabilities and ours."""
    stop, mode = recipe.grpo.stop, recipe.vllm.mode
    ends = {"stop_strings": stop} if mode == "none" else {"stop": stop, "include_stop_str_in_output": True}
    return {"generation_kwargs": ends if stop else None, "vllm_importance_sampling_mode": recipe.grpo.importance_sampling}


class LeanGRPOTrainer(GRPOTrainer):
    """TRL's GRPOTrainer for text, leaner. `stop`: strings that end a completion, as they stand in `generation_kwargs`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        ends = self.args.generation_kwargs or {}
        self.stop = ends.get("stop") or ends.get("stop_strings") or []
        asked = self.args  # means or quantiles over the tokens of a micro-batch depend on which completions share it
        self._depends_on_company = (self.loss_type == "bnpo" or bool(asked.entropy_coef) or asked.use_adaptive_entropy
                                    or asked.top_entropy_quantile < 1)
        self._masks_truncated, self.mask_truncated_completions = self.mask_truncated_completions, False  # TRL's own masking
        if self.ref_model is not None and self.is_deepspeed_enabled:
            restore_rotations(self.ref_model)
        if self.use_vllm and self.args.vllm_mode == "server" and self.accelerator.is_main_process:
            client = self.vllm_generation.vllm_client
            client.generate = one_request_a_prompt(client.generate)

    def ended(self, completion_ids: list[int]) -> bool:
        """Whether a completion ended by itself or at a stop string, and not because it had no room left."""
        return bool(completion_ids) and (completion_ids[-1] in self.eos_token_ids
                                         or holds_stop(completion_ids, self.stop, self._tokenizer.decode))

    def _generate_single_turn(self, *args, **kwargs):
        with self.accelerator.autocast():  # once for all tokens: transformers would cast all float32 weights again for each
            completion_ids, logprobs = super()._generate_single_turn(*args, **kwargs)
        if self.stop and logprobs is None:  # transformers pads what has ended, and vLLM does not
            completion_ids = [cut_at_stop(ids, self.stop, self._tokenizer.decode) for ids in completion_ids]
        return completion_ids, logprobs

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if self._masks_truncated:
            mask = output["completion_mask"]
            whole = [self.ended(ids[kept].tolist()) for ids, kept in zip(output["completion_ids"], mask.bool(), strict=True)]
            output["completion_mask"] = mask * torch.tensor(whole, device=mask.device)[:, None]
            output["num_items_in_batch"] = self.accelerator.gather(output["completion_mask"].sum()).sum()
        return output

    def _prepare_inputs(self, generation_batch):
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if not self.model.training or self._buffered_inputs is before or self._depends_on_company:
            return inputs
        self._buffered_inputs = by_length(self._buffered_inputs)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, **more):
        size, parts = batch_size or len(input_ids), []
        for ids, mask in zip(input_ids.split(size), attention_mask.split(size), strict=True):
            first, last = used_columns(mask, logits_to_keep)
            kept = logits_to_keep - (mask.shape[1] - last)
            logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(
                model, ids[:, first:last], mask[:, first:last], kept, **more)
            parts.append((_widened(logps, logits_to_keep), _widened(entropies, logits_to_keep), aux_loss))
        logps, entropies, aux_losses = zip(*parts, strict=True)
        return (torch.cat(logps), None if entropies[0] is None else torch.cat(entropies),
                None if aux_losses[0] is None else torch.stack(aux_losses).mean())


def used_columns(mask: torch.Tensor, logits_to_keep: int) -> tuple[int, int]:
    """(first, end) of the columns in which any row of an attention mask has a token, of a prompt padded on the left and a
    completion of `logits_to_keep` columns padded on the right; at least one column of the completion."""
    used = mask.any(0).nonzero()
    return int(used[0]), max(int(used[-1]), mask.shape[1] - logits_to_keep) + 1


def _widened(values: torch.Tensor | None, columns: int) -> torch.Tensor | None:
    return None if values is None else pad(values, (0, columns - values.shape[1]))


def by_length(batches: list[dict]) -> list[dict]:
    """The micro-batches of a step with its completions in order of length, the longest first: if memory is too small, the
    first says so. Micro-batches keep their sizes; what is not one value or row per completion stays as it is."""
    lengths = torch.cat([batch["completion_mask"].sum(1) for batch in batches])
    sizes = [len(batch["completion_mask"]) for batch in batches]
    parts = lengths.argsort(descending=True, stable=True).split(sizes)
    rows = {name: torch.cat([batch[name] for batch in batches]) for name, value in batches[0].items()
            if isinstance(value, torch.Tensor) and value.dim()}
    return [batch | {name: values[part] for name, values in rows.items()} for batch, part in zip(batches, parts, strict=True)]


def holds_stop(ids: list[int], stop: list[str], decode: Callable[[list[int]], str]) -> bool:
    """Whether a stop string stands in the text of token ids, which is decoded only if there is one to look for."""
    text = decode(ids) if stop else ""
    return any(string in text for string in stop)


def cut_at_stop(ids: list[int], stop: list[str], decode: Callable[[list[int]], str]) -> list[int]:
    """Token ids up to the one that completes a stop string; all of them where there is none."""
    return ids[: bisect.bisect_left(range(len(ids) + 1), True, key=lambda count: holds_stop(ids[:count], stop, decode))]


def one_request_a_prompt(generate: Callable[..., dict]) -> Callable[..., dict]:
    """`generate` of TRL's vLLM client, which asks for each prompt by itself, all at the same time; results keep their order."""
    def ask(prompts, features=None, **sampling) -> dict:
        with ThreadPoolExecutor(len(prompts)) as threads:
            answers = list(threads.map(lambda prompt: generate(prompts=[prompt], **sampling), prompts))
        return {name: None if value is None else [row for answer in answers for row in answer[name]]
                for name, value in answers[0].items()}

    return ask
