"""A small OpenAI-compatible server on 127.0.0.1 that misbehaves on demand."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FaultyServer:
    """Echoes the last message in upper case. ``script`` lists what to do to each request in turn.

    Entries: ``"ok"``, ``("status", code, headers)``, ``"half"`` (the body breaks off), ``"stall"``
    (silence until the client hangs up), ``"not json"``, ``"text"`` (plain text), ``"no choices"``,
    ``"no finish"``, ``"hang up"``, ``("raw", object)``, ``("chunk", object)`` (the first of a
    stream). After the last entry: ``"ok"``.
    """

    def __init__(self, script=()):
        self.script = list(script)
        self.bodies: list[dict] = []
        self.busy = self.most_busy = 0
        self.delay = 0.0
        self.lock = threading.Lock()
        self.stop = threading.Event()

    def next_action(self):
        with self.lock:
            return self.script.pop(0) if self.script else "ok"


def _reply(body: dict) -> dict:
    if "messages" in body:
        text = body["messages"][-1]["content"].upper()
    else:
        prompt = body["prompt"]
        text = prompt.upper() if isinstance(prompt, str) else f"{len(prompt)} TOKENS"
    words = text.split()
    choices = []
    for i in range(body.get("n", 1)):
        choice = {"index": i, "finish_reason": "stop"}
        logprobs = [-0.5 * (k + 1) for k in range(len(words))]
        if "messages" in body:
            choice["message"] = {"role": "assistant", "content": text, "reasoning_content": "hm"}
            if body.get("logprobs"):
                tokens = zip(words, logprobs, strict=True)
                choice["logprobs"] = {"content": [{"token": w, "logprob": p} for w, p in tokens]}
        else:
            choice["text"] = text
            if "logprobs" in body:
                choice["logprobs"] = {"token_logprobs": logprobs}
        if body.get("return_token_ids"):
            choice["token_ids"] = list(range(len(words)))
        choices.append(choice)
    usage = {"prompt_tokens": 7, "completion_tokens": len(words) * len(choices)}
    return {"id": "x", "object": "o", "created": 1, "choices": choices, "usage": usage}


def _chunks(body: dict) -> list[dict]:
    whole = _reply(body)
    chunks = []
    for choice in whole["choices"]:
        text = choice["message"]["content"]
        for k in range(0, len(text), 4):
            delta = {"content": text[k : k + 4]}
            chunks.append({"choices": [{"index": choice["index"], "delta": delta}]})
        end = {"index": choice["index"], "delta": {}, "finish_reason": "stop"}
        if "token_ids" in choice:
            end["token_ids"] = choice["token_ids"]
        if "logprobs" in choice:
            end["logprobs"] = choice["logprobs"]
        chunks.append({"choices": [end]})
    return [*chunks, {"choices": [], "usage": whole["usage"]}]


def _handler(server: FaultyServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            action = server.next_action()
            with server.lock:
                server.bodies.append(body)
                server.busy += 1
                server.most_busy = max(server.most_busy, server.busy)
            try:
                time.sleep(server.delay)
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    self.act(action, body)
            finally:
                with server.lock:
                    server.busy -= 1

        def send(
            self, payload: bytes, *, status=200, kind="application/json", headers=(), size=None
        ):
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(payload) if size is None else size))
            for name, value in headers:
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(payload)
            self.wfile.flush()

        def act(self, action, body):
            whole = json.dumps(_reply(body)).encode()
            if action == "hang up":
                self.close_connection = True
            elif action == "stall":
                server.stop.wait(5)
                self.close_connection = True
            elif action == "not json":
                self.send(b'{"choices": [')
            elif action == "text":
                self.send(b"<html>gateway</html>", kind="text/html")
            elif action == "no choices":
                self.send(b'{"choices": null}')
            elif isinstance(action, tuple) and action[0] == "status":
                error = {
                    "error": {"message": f"told to fail {action[1]}", "code": action[3:] or None}
                }
                if action[3:]:
                    error["error"]["code"] = action[3]
                self.send(json.dumps(error).encode(), status=action[1], headers=action[2])
            elif isinstance(action, tuple) and action[0] == "raw":
                self.send(json.dumps(action[1]).encode())
            elif body.get("stream"):
                self.stream(action, body)
            elif action == "half":
                self.send(whole[: len(whole) // 2], size=len(whole))
                self.close_connection = True
            else:
                self.send(whole)

        def stream(self, action, body):
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")
            self.end_headers()
            self.close_connection = True
            chunks = _chunks(body)
            if isinstance(action, tuple):
                chunks = [action[1], *chunks]
            if action in ("half", "half stall"):
                chunks = chunks[: len(chunks) // 2]
            if action == "no finish":
                chunks = [
                    c for c in chunks if not any(p.get("finish_reason") for p in c["choices"])
                ]
            for chunk in chunks:
                self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
                self.wfile.flush()
            if action == "half stall":
                server.stop.wait(5)
            elif action == "bad chunk":
                self.wfile.write(b"data: {not json\n\n")
            elif action != "half":
                self.wfile.write(b"data: [DONE]\n\n")

    return Handler


@contextlib.contextmanager
def serve(script=(), port: int = 0) -> Iterator[tuple[FaultyServer, str]]:
    """The server and its base URL."""
    server = FaultyServer(script)
    http = ThreadingHTTPServer(("127.0.0.1", port), _handler(server))
    http.daemon_threads = True
    thread = threading.Thread(
        target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    )
    thread.start()
    try:
        yield server, f"http://127.0.0.1:{http.server_address[1]}/v1"
    finally:
        server.stop.set()
        http.shutdown()
        http.server_close()
        thread.join()
