"""What scripts/check_vllm.py has done by vLLM: one task as JSON on stdin, its result as the last line of stdout.

Runs in an environment with vLLM, one process for each task.
"""

import json
import sys
import time
from typing import Any

from vllm import LLM, SamplingParams


def engine(task: dict[str, Any]) -> Any:
    """The engine of a folder; `settings` are vLLM's."""
    settings = {"dtype": "float32", "enforce_eager": True, "disable_log_stats": True, **task["settings"]}
    return LLM(task["folder"], **settings).llm_engine


def greedy(new: int, logprobs: int | None = None) -> SamplingParams:
    """The most likely token, `new` times."""
    return SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, logprobs=logprobs)


def scheduler(inner: Any) -> Any:
    """Of an engine in this process."""
    return inner.engine_core.engine_core.scheduler


def texts(task: dict[str, Any]) -> dict[str, Any]:
    """All prompts at once: tokens and their log-probabilities; every `preempt` steps all requests lose their pages, and
    `abort` more requests are given up, one in each step from the third on."""
    inner, done, steps, preempted, most = engine(task), {}, 0, 0, 0
    given_up = [f"abort{index}" for index in range(task.get("abort", 0))]
    for index, ids in enumerate(task["prompts"]):
        inner.add_request(str(index), {"prompt_token_ids": ids}, greedy(task["new"], logprobs=1))
        if index < len(given_up):
            inner.add_request(given_up[index], {"prompt_token_ids": ids[::-1]}, greedy(task["new"]))
    started, left = time.perf_counter(), list(given_up)
    while inner.has_unfinished_requests():
        for output in inner.step():
            if output.finished and not output.request_id.startswith("abort"):
                done[int(output.request_id.split("-")[0])] = output.outputs[0]
        steps += 1
        running = len(scheduler(inner).running)
        most = max(most, running)
        if left and steps > 2:
            inner.abort_request([left.pop(0)])
        if task.get("preempt") and steps % task["preempt"] == 0 and inner.has_unfinished_requests():
            preempted += running
            inner.reset_prefix_cache(reset_running_requests=True)
    order = [done[index] for index in range(len(task["prompts"]))]
    return {
        "tokens": [list(each.token_ids) for each in order],
        "logprobs": [
            [place[token].logprob for token, place in zip(each.token_ids, each.logprobs, strict=True)] for each in order
        ],
        "steps": steps,
        "preempted": preempted,
        "aborted": len(given_up) - len(left),
        "most_running": most,
        "seconds": time.perf_counter() - started,
        "pages": pages(inner),
    }


def pages(inner: Any) -> dict[str, Any]:
    """How many pages there are, and how many are free now."""
    pool = scheduler(inner).kv_cache_manager.block_pool
    return {"all": pool.num_gpu_blocks, "free": pool.get_num_free_blocks()}


def speed(task: dict[str, Any]) -> dict[str, Any]:
    """Requests of one length at once: seconds to read all prompts, and tokens per second while all of them write."""
    inner = engine(task)
    cells = []
    for context, concurrency in task["loads"]:
        ids = (task["ids"] * (context // len(task["ids"]) + 1))[:context]
        for index in range(concurrency):
            inner.add_request(f"{context}-{concurrency}-{index}", {"prompt_token_ids": ids}, greedy(task["new"]))
        written, waiting, began, reading, most = 0, concurrency, time.perf_counter(), None, 0
        ends = []
        while inner.has_unfinished_requests():
            outputs = inner.step()
            most = max(most, len(scheduler(inner).running))
            first = [o for o in outputs if len(o.outputs[0].token_ids) == 1]
            waiting -= len(first)
            if waiting == 0:
                if reading is None:
                    reading = time.perf_counter() - began
                else:
                    written += len(outputs)
                    ends.append(time.perf_counter() - began)
        writing = (ends[-1] - reading) if reading is not None and ends else None
        cells.append({
            "context": context, "concurrency": concurrency, "reading_seconds": reading, "most_running": most,
            "tokens_per_second": written / writing if writing else None, "seconds": time.perf_counter() - began,
        })  # fmt: skip
    return {"cells": cells, "pages": pages(inner)}


def several(task: dict[str, Any]) -> list[Any]:
    """`texts` of many folders; where one cannot be opened, why not."""
    found: list[Any] = []
    for each in task["tasks"]:
        try:
            found.append(texts(each))
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


if __name__ == "__main__":
    given = json.load(sys.stdin)
    print(json.dumps({"texts": texts, "speed": speed, "several": several}[given["task"]](given)))
