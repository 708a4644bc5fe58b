"""vLLM as the server of a Writing RM: the command that `lwz serve-rm` becomes, and the token that it asks for."""

import hmac
import os
import sys
from importlib.util import find_spec
from pathlib import Path

from lwzlib.base.kit import ModelError
from lwzlib.base.models import resolve
from lwzlib.base.recipe import Recipe
from lwzlib.base.rows import read_json
from lwzlib.method.writing_rm import weights_of


def serve_command(folder: Path, recipe: Recipe, host: str, port: int, dtype: str, options: list[str]) -> list[str]:
    """vLLM's pooling server of the Writing RM in `folder`, under its identity, for texts of up to its `max_tokens`. The recipe
    says how many GPUs share it and how much of their memory it takes; vLLM's own `options` come last, and so win.
    Raises ModelError where vLLM is not installed."""
    if not find_spec("vllm"):
        raise ModelError("`lwz serve-rm` needs vLLM: pip install -e '.[gpu]' (Linux, GPU; see environment.yml)")
    info = read_json(folder / "writing_rm.json")
    flags = {
        "model": resolve(weights_of(str(folder))), "served-model-name": info["identity"],
        "max-model-len": info["max_tokens"], "runner": "pooling",
        "host": host, "port": port, "dtype": dtype or recipe.model.dtype,
        "tensor-parallel-size": recipe.vllm.tensor_parallel, "gpu-memory-utilization": recipe.vllm.memory_share,
        "shutdown-timeout": 300}  # by default requests in flight when it is told to end are never answered, and it does not end
    if os.environ.get("LWZ_RM_TOKEN"):
        flags["middleware"] = f"{__name__}.AskForToken"
    given = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *given, *options]


class AskForToken:
    """ASGI middleware: `$LWZ_RM_TOKEN` is asked for, except by /health. vLLM's own key would guard /v1, and not /pooling."""

    def __init__(self, app):
        self.app, self.expected = app, f"Bearer {os.environ['LWZ_RM_TOKEN']}".encode()

    async def __call__(self, scope, receive, send):
        """Pass a request on, or answer 401."""
        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        if scope["type"] == "lifespan" or scope["path"] == "/health" or hmac.compare_digest(given, self.expected):
            return await self.app(scope, receive, send)
        await send({"type": "http.response.start", "status": 401, "headers": [(b"www-authenticate", b"Bearer")]})
        await send({"type": "http.response.body", "body": b"this server asks for its LWZ_RM_TOKEN"})
