"""A model of this machine behind an OpenAI-compatible server, for as long as a block of code runs.

The paper serves QwQ-32B by vLLM. Here `transformers serve` answers the same requests on the CPU, so a notebook without a
GPU or a network goes through the very code that asks a large model. One process holds the model, on a free loopback port.
"""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from lwzlib.base import models
from lwzlib.base.kit import ModelError
from lwzlib.base.processes import end_with_parent
from lwzlib.endpoints import llm

_CACHE = {"cb_block_size": 32, "cb_num_blocks": 512, "cb_max_batch_tokens": 1024}  # 16,384 tokens for all requests together
# Threads that spin while they wait took 80 s for what takes 11 s so, on 2 cores beside another busy process.
_POLITE = {"OMP_WAIT_POLICY": "passive"}


@contextlib.contextmanager
def serving(name: str, dtype: str = "bfloat16", start_s: float = 180.0, **settings) -> Iterator[llm.Settings]:
    """Settings with which `llm.ask` and `curate` reach the model `name` (as in a recipe), whose server ends with the block or
    with this process. `settings` go into `llm.Settings`. Decoding is greedy whatever the temperature, unless the model's own
    generation config samples. Requests in flight share a batch, so the last digits, and now and then a word, depend on what
    else is asked at the time. Raises ModelError if the model is not there or not served within `start_s` seconds, LLMError
    for a wrong setting."""
    path = models.resolve(name)
    # The server takes what follows an @ for a revision; so a kit model goes by its short name, whatever the cache is called.
    where, model = (Path(path).parent, Path(path).name) if name.startswith("kit:") else (None, path)
    with tempfile.TemporaryDirectory(prefix="lwz-llm-", ignore_cleanup_errors=True) as scratch:
        log = Path(scratch) / "log.txt"
        with log.open("wb") as file:
            process = subprocess.Popen([sys.executable, "-m", "lwzlib.endpoints.local_server", model, dtype], cwd=where,
                                       stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                                       env=_POLITE | os.environ | {"LWZ_END_WITH": str(os.getpid())})
        try:
            url = _address(process, log, name, start_s)
            yield llm.configure(**{"base_url": f"{url}/v1", "model": model, "api_key_env": "LWZ_LOCAL_KEY"} | settings)
        finally:
            process.kill()  # it holds nothing that could be lost
            process.wait()


def _address(process: subprocess.Popen, log: Path, name: str, start_s: float) -> str:
    """Address of the server, once it has loaded the model and answers that it is well."""
    deadline = time.monotonic() + start_s
    while not (url := re.search(r"running on (http://127\.0\.0\.1:\d+)", lines := log.read_text(errors="replace"))):
        problem = (f"ended with exit code {process.returncode}" if process.poll() is not None else
                   f"was not ready within {start_s:g} s" if time.monotonic() > deadline else "")
        if problem:
            raise ModelError(f"the server of {name} {problem}; its last lines:\n{lines[-1500:].strip()}")
        time.sleep(0.1)
    httpx.get(f"{url[1]}/health", trust_env=False, timeout=start_s).raise_for_status()
    return url[1]


if __name__ == "__main__":  # the server's own process
    end_with_parent()
    from transformers.cli.serve import Serve

    from lwzlib.base.fast_cpu import computed_in

    dtype = computed_in(sys.argv[2])
    Serve(sys.argv[1], continuous_batching=True, dtype=dtype, device="cpu", host="127.0.0.1", port=0, **_CACHE)
