"""A small server on 127.0.0.1 with the endpoints of vLLM that the rollouts use, and its faults."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from safetensors.torch import load_file


class FakeVllm:
    """Answers a prompt with tokens that follow from its seed and from the weights it holds.

    ``faults`` maps a path to what happens to its next requests, in turn: ``"hang up"``, ``"half"``
    (a stream breaks off), ``"stall"``, ``"missing"`` (404), an HTTP status, ``"restart"`` (the
    server has its first weights again, then answers), or ``"ok"``.
    """

    def __init__(self, *, scaled: bool = True, token_ids: bool = True):
        self.scaled, self.token_ids = scaled, token_ids
        self.faults: dict[str, list] = {}
        self.requests: list[tuple[str, dict]] = []
        self.version: str | None = None
        self.weight = 0.0  # the first number of the weight "w"
        self.loaded: dict = {}
        self.paused = False
        self.is_updating = False
        self.lock = threading.Lock()
        self.stop = threading.Event()

    def paths(self) -> list[str]:
        return [path for path, _ in self.requests]

    def restart(self) -> None:
        self.version, self.weight, self.paused, self.is_updating = None, 0.0, False, False


def answer_ids(body: dict, weight: float) -> list[int]:
    """Up to ``max_tokens`` ids; the end token is 2."""
    start = (body.get("seed") or 0) % 50 + 10 + round(100 * weight)
    return [start, start + 1, 2][: body["max_tokens"]]


def _chunks(server: FakeVllm, body: dict) -> list[dict]:
    allowed = body.get("allowed_token_ids")
    ids = allowed or answer_ids(body, server.weight)
    logprob = 0.0 if allowed and server.scaled else -0.5
    chunks = []
    for token in ids:
        choice = {"index": 0, "text": f"t{token} ", "logprobs": {"token_logprobs": [logprob]}}
        if server.token_ids:
            choice["token_ids"] = [token]
        chunks.append({"choices": [choice]})
    chunks[-1]["choices"][0]["finish_reason"] = "stop" if ids[-1] == 2 else "length"
    usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": len(ids)}
    return [*chunks, {"choices": [], "usage": usage}]


def _handler(server: FakeVllm) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def do_GET(self):
            self.act({})

        def do_POST(self):
            size = int(self.headers.get("Content-Length") or 0)
            self.act(json.loads(self.rfile.read(size)) if size else {})

        def act(self, body):
            with server.lock:
                server.requests.append((self.path, body))
                queue = server.faults.get(self.path.partition("?")[0])
                fault = queue.pop(0) if queue else "ok"
                if fault == "restart":
                    server.restart()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                if fault == "hang up":
                    self.close_connection = True
                elif fault == "stall":
                    server.stop.wait(5)
                    self.close_connection = True
                elif fault == "missing":
                    self.send({"detail": "Not Found"}, 404)
                elif isinstance(fault, int):
                    self.send({"error": {"message": "it says no"}}, fault)
                elif self.path == "/v1/completions":
                    self.stream(_chunks(server, body), whole=fault != "half")
                else:
                    self.control(body)

        def control(self, body):
            path = self.path
            if path == "/weight_info":
                return self.send({"weight_version": server.version})
            if path == "/pause?mode=keep":
                server.paused = True
            elif path == "/resume":
                server.paused = False
            elif path == "/start_weight_update":
                if server.is_updating:
                    message = "start_weight_update called while a weight update is already active."
                    return self.send({"error": {"message": message}}, 500)
                server.is_updating = True
            elif path == "/update_weights":
                assert server.paused and server.is_updating
                server.loaded = load_file(body["update_info"]["path"])
            elif path == "/finish_weight_update":
                assert server.is_updating
                server.is_updating = False
                if "w" in server.loaded:
                    server.weight = float(server.loaded["w"].flatten()[0])
                server.version = body["weight_version"]
            elif path == "/reset_prefix_cache":
                return self.send(None)
            self.send({"message": "done"})

        def send(self, value, status=200):
            payload = b"" if value is None else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def stream(self, chunks, *, whole):
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")
            self.end_headers()
            self.close_connection = True
            for chunk in chunks if whole else chunks[:1]:
                self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
                self.wfile.flush()
            if whole:
                self.wfile.write(b"data: [DONE]\n\n")

    return Handler


@contextlib.contextmanager
def serving(server: FakeVllm) -> Iterator[str]:
    """The root URL while the block runs."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(server))
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_address[1]}"
    finally:
        server.stop.set()
        http.shutdown()
        http.server_close()
        thread.join()
