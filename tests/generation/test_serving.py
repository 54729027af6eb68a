"""A converted folder in the hands of transformers' own front ends: pipelines, and its server over HTTP."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import TextStreamer, pipeline
from transformers.utils.import_utils import is_serve_available

from linearize.generation import generate

TURNS = ("The river rose", "And the boat?", "And the mill?")
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
ROOT = Path(__file__).parents[2]
serving = pytest.mark.skipif(
    not is_serve_available(), reason="needs transformers' server: pip install transformers[serving]"
)


@pytest.fixture(scope="module")
def answers(converted: Path) -> list[str]:
    """Of a conversation of which each turn is read as text, as front ends do."""
    messages, texts = [], []
    for turn in TURNS:
        messages.append({"role": "user", "content": turn})
        texts += generate(converted, messages, max_new_tokens=8, temperature=0).texts
        messages.append({"role": "assistant", "content": texts[-1]})
    return texts


def test_a_pipeline_chats_in_several_turns(converted: Path, answers: list[str]) -> None:
    pipe, messages = pipeline("text-generation", model=str(converted)), []
    for turn, expected in zip(TURNS, answers, strict=True):
        messages = [*messages, {"role": "user", "content": turn}]
        messages = pipe(messages, **GREEDY)[0]["generated_text"]  # type: ignore[index]
        assert messages[-1] == {"role": "assistant", "content": expected}


def test_a_pipeline_takes_a_batch_and_streams(converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe: Any = pipeline("text-generation", model=str(converted))
    texts = ["The river", "Anna brought the boat to the mill, and the miller said", "If"]
    alone = [pipe(each, return_full_text=False, **GREEDY)[0]["generated_text"] for each in texts]
    together = pipe(texts, batch_size=3, return_full_text=False, **GREEDY)
    assert [each[0]["generated_text"] for each in together] == alone
    capsys.readouterr()
    pipe(texts[0], streamer=TextStreamer(pipe.tokenizer, skip_prompt=True, skip_special_tokens=True), **GREEDY)
    assert capsys.readouterr().out.strip() == alone[0].strip()


# --- over HTTP


@pytest.fixture(scope="module")
def server(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server of transformers that has the folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "import linearize; from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", code, "serve", str(converted), "--host", "127.0.0.1", "--port", str(port)]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, "--device", "cpu"],
            stdout=out,
            stderr=out,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        )
    try:
        for _ in range(240):
            assert process.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def ask(server: str, model: Path, messages: list[dict], stream: bool) -> str:
    """The answer of a server to a conversation, at once or in the pieces that it streams."""
    body = {"model": str(model), "messages": messages, "stream": stream, "temperature": 0.0, "max_tokens": 8}
    request = urllib.request.Request(
        f"{server}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        if not stream:
            return json.load(response)["choices"][0]["message"]["content"]
        lines = [line.decode().removeprefix("data: ").strip() for line in response if line.startswith(b"data: {")]
    deltas = [choice["delta"].get("content") for line in lines for choice in json.loads(line)["choices"]]
    assert len([delta for delta in deltas if delta]) > 1
    return "".join(delta or "" for delta in deltas)


@pytest.mark.slow
@serving
@pytest.mark.parametrize("stream", [False, True])
def test_the_server_answers_in_several_turns(stream: bool, server: str, converted: Path, answers: list[str]) -> None:
    messages: list[dict] = []
    for turn, expected in zip(TURNS, answers, strict=True):
        messages.append({"role": "user", "content": turn})
        said = ask(server, converted, messages, stream)
        # A stream keeps back the first bytes of a letter whose last ones never came.
        assert said.strip().rstrip("\ufffd") == expected.strip().rstrip("\ufffd")
        messages.append({"role": "assistant", "content": expected})
