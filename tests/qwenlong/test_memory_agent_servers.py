"""The agent's command against transformers' own server, which knows less than vLLM."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from qwenlong import cli
from qwenlong.models import demo_document, demo_model

pytestmark = pytest.mark.real

START_SECONDS = 300


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Base URL and model name of ``transformers serve`` with SmolLM2-135M in fp32."""
    missing = [n for n in ("fastapi", "uvicorn") if importlib.util.find_spec(n) is None]
    if missing:
        pytest.skip(f"transformers serve needs {missing}: pip install fastapi uvicorn")
    model = demo_model()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("server")
    program = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", program, "serve", str(model), "--device", "cpu"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"no server:\n{(folder / 'log').read_text(errors='replace')[-3000:]}")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1", str(model)
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_text_is_read_through_transformers_server(server, tmp_path, capsys):
    url, model = server
    document = tmp_path / "book.txt"
    document.write_text(demo_document()[:1_600])
    arguments = ["agent", "ask", "--input", str(document), "--question", "What is a name?"]
    arguments += ["--model", model, "--base-url", url, "--tokenizer", model, "--temperature", "0"]
    arguments += ["--chunk-tokens", "250", "--memory-tokens", "16", "--plan-tokens", "8"]
    arguments += ["--answer-tokens", "8", "--repairs", "0", "--fallback", "take"]
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 0, capsys.readouterr().err
    written = json.loads((tmp_path / "book.agent" / "answers.json").read_text())
    [row] = written["answers"]
    assert row["chunks"] >= 2 and row["calls"] == row["chunks"] + 1
    assert row["tokens"]["document"] > 250
    assert written["usage"]["answers"] == written["usage"]["attempts"] == row["calls"]
    assert row["tokens"]["prompt"] > 400 * row["chunks"] and row["tokens"]["completion"] > 0
