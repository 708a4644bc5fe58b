"""Put this folder on PYTHONPATH, and each completion of GRPO is drawn from a generator of its own, seeded by its step and its
place in the whole batch: then what is sampled does not depend on how many processes sample it, and runs can be compared.

Everything else (rewards, gathering, advantages, loss, gradients, optimiser) is the kit's and TRL's own."""

import os
import sys

if "lwzlib.cli.main" in sys.orig_argv and "torch.distributed.run" not in sys.orig_argv:
    import torch

    from lwzlib.base import fast_cpu
    from lwzlib.method.grpo import LongWriterGRPOTrainer

    at = {"step": -1, "token": 0}
    multinomial, generate = torch.multinomial, LongWriterGRPOTrainer._generate_single_turn

    def draw(probabilities, num_samples, **kwargs):
        if at["step"] < 0 or num_samples != 1 or probabilities.dim() != 2:
            return multinomial(probabilities, num_samples, **kwargs)
        rows, first = len(probabilities), int(os.environ.get("RANK", "0")) * len(probabilities)
        noise = [torch.rand(probabilities.shape[1], generator=torch.Generator().manual_seed(
            (at["step"] * 10_000 + at["token"]) * 1_000 + first + row)) for row in range(rows)]
        at["token"] += 1
        return (probabilities / -torch.stack(noise).log()).argmax(-1, keepdim=True)  # the exponential race: exact sampling

    def generate_rowwise(self, *args, **kwargs):
        at.update(step=self.state.global_step, token=0)
        try:
            return generate(self, *args, **kwargs)
        finally:
            at["step"] = -1

    fast_cpu._multinomial, LongWriterGRPOTrainer._generate_single_turn = draw, generate_rowwise
