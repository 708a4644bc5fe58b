"""vLLM's POST /pooling without a model, in this process: the score of a text is a hash of its token ids."""

import contextlib
import hashlib
import http.server
import json
import threading
import time


def expected(ids):
    return int.from_bytes(hashlib.sha256(json.dumps(list(ids)).encode()).digest()[:6]) / 2**48


def answer(model, texts, score=expected):
    """As vLLM gives it: (status, headers, content)."""
    rows = [{"index": i, "object": "pooling", "data": [score(ids)]} for i, ids in enumerate(texts)]
    return 200, {}, json.dumps({"id": "pool-1", "object": "list", "created": 1, "model": model, "data": rows,
                                "usage": {"prompt_tokens": 1, "total_tokens": 1}}).encode()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        server.requests.append({"at": time.monotonic(), "path": self.path, "headers": dict(self.headers)} | request)
        if not server.gate.wait(20) or server.stopped:
            return  # without an answer, as a server that is killed
        if server.script:
            status, headers, content = server.script.pop(0)
        elif request["model"] != server.model:
            status, headers, content = 404, {}, f"The model `{request['model']}` does not exist.".encode()
        else:
            status, headers, content = answer(server.model, request["input"], server.score)
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        self.send_response(503 if self.server.script else 200)  # /health: with more of the script to come, something is wrong
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    """`script`: answers to give before those of `score`. While `gate` is not set, requests wait."""

    request_queue_size = 128

    def __init__(self, model="rm-a", port=0, script=(), score=expected):
        super().__init__(("127.0.0.1", port), Handler)
        self.model, self.script, self.score, self.requests, self.stopped = model, list(script), score, [], False
        self.gate = threading.Event()
        self.gate.set()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,)).start()

    def stop(self):
        """Stop listening, and drop the connections of the requests that wait."""
        self.stopped = True
        self.shutdown()
        self.socket.close()
        self.gate.set()
        self.server_close()


@contextlib.contextmanager
def serving(**settings):
    server = Server(**settings)
    try:
        yield server
    finally:
        server.stop()
