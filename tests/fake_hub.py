"""A stand-in for the hub: it makes repositories and takes commits, weights by LFS, and keeps what it received.

`HF_ENDPOINT` points a process to it. A status in `refuses` is answered in the place of the route that it names.
"""

import base64
import contextlib
import json
import socket
import threading
from dataclasses import dataclass, field

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

TOKEN = "hf_" + "s3cret" * 6


@dataclass
class Hub:
    """What the stand-in received: `files` of each repository by name, `tokens` that came with requests."""

    url: str = ""
    repositories: dict = field(default_factory=dict)  # name: what creation asked for
    files: dict = field(default_factory=dict)  # name: {path: bytes}
    blobs: dict = field(default_factory=dict)
    tokens: set = field(default_factory=set)
    refuses: dict = field(default_factory=dict)  # "create" or "commit": status

    def refused(self, what: str, request: Request) -> JSONResponse | None:
        self.tokens.add(request.headers.get("authorization"))
        if status := self.refuses.get(what):
            return JSONResponse({"error": f"said by the hub: {what} with {request.headers['authorization']}"}, status)
        return None

    async def create(self, request: Request) -> JSONResponse:
        if refused := self.refused("create", request):
            return refused
        asked = await request.json()
        name = f"{asked['organization']}/{asked['name']}"
        known = name in self.repositories
        self.repositories.setdefault(name, asked)
        return JSONResponse({"url": f"{self.url}/{name}"}, 409 if known else 200)

    async def info(self, request: Request) -> JSONResponse:
        name = "{user}/{name}".format(**request.path_params)
        if refused := self.refused("create", request):
            return refused
        return JSONResponse({"id": name, "private": self.repositories[name].get("visibility") == "private"})

    async def preupload(self, request: Request) -> JSONResponse:
        files = (await request.json())["files"]
        return JSONResponse({"files": [
            {"path": file["path"], "shouldIgnore": False,
             "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"} for file in files]})

    async def batch(self, request: Request) -> JSONResponse:
        objects = (await request.json())["objects"]
        return JSONResponse({"transfer": "basic", "objects": [
            {**blob, "actions": {"upload": {"href": f"{self.url}/blobs/{blob['oid']}"}}} for blob in objects]})

    async def blob(self, request: Request) -> JSONResponse:
        self.blobs[request.path_params["oid"]] = await request.body()
        return JSONResponse({})

    async def commit(self, request: Request) -> JSONResponse:
        if refused := self.refused("commit", request):
            return refused
        name = "{user}/{name}".format(**request.path_params)
        for line in (await request.body()).splitlines():
            change = json.loads(line)
            value = change["value"]
            if change["key"] == "file":
                self.files.setdefault(name, {})[value["path"]] = base64.b64decode(value["content"])
            elif change["key"] == "lfsFile":
                self.files.setdefault(name, {})[value["path"]] = self.blobs[value["oid"]]
        return JSONResponse({"commitUrl": f"{self.url}/{name}/commit/{'a' * 40}", "commitOid": "a" * 40})


async def _valid_yaml(request: Request) -> JSONResponse:
    return JSONResponse({"warnings": [], "errors": []})


@contextlib.contextmanager
def running():
    """A hub on a free port of loopback, with `url`."""
    hub = Hub()
    app = Starlette(routes=[
        Route("/api/repos/create", hub.create, methods=["POST"]),
        Route("/api/validate-yaml", _valid_yaml, methods=["POST"]),
        Route("/api/models/{user}/{name}", hub.info),
        Route("/api/models/{user}/{name}/preupload/{revision}", hub.preupload, methods=["POST"]),
        Route("/{user}/{name}.git/info/lfs/objects/batch", hub.batch, methods=["POST"]),
        Route("/blobs/{oid}", hub.blob, methods=["PUT"]),
        Route("/api/models/{user}/{name}/commit/{revision}", hub.commit, methods=["POST"])])
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        bound.listen()
        hub.url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        yield hub
        server.should_exit = True
        thread.join()
