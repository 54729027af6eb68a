"""Answers of an exported graph, by onnxruntime and tokenizers alone: torch is not imported.

A conversation keeps its state, arrays of constant size, from turn to turn, so that only what is new is read.
"""

import json
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import numpy as np

from linearize.checkpoint import text as agreed
from linearize.checkpoint.reading import AGAIN, read_json, reading
from linearize.errors import InputError
from linearize.formats import plain
from linearize.generation.result import Generation, Message, asked, wrong_settings
from linearize.generation.result import chat as talk

MANIFEST = "graph.json"
FORMAT = 1
State = dict[str, Any]


def is_graph(folder: str | Path) -> bool:
    """Whether a folder holds what `linearize export --to onnx` or `--to pt2` wrote."""
    return (Path(folder) / MANIFEST).is_file()


class Graph:
    """An exported model, opened.

    Args:
        folder: of `linearize export --to onnx`.
        threads: of onnxruntime; None: as many as there are cores.

    Raises:
        InputError: it holds no such graph, a part of it is damaged, or onnxruntime is not installed.
    """

    def __init__(self, folder: str | Path, threads: int | None = None):
        self.folder = Path(folder)
        self.facts = facts = read_json(self.folder / MANIFEST, AGAIN)
        if facts.get("graph") != "onnx" or facts.get("format") != FORMAT:
            raise InputError(
                f"{folder}: holds a graph of the kind {facts.get('graph')!r}, format {facts.get('format')}; this "
                f"version runs onnx, format {FORMAT}: export the model again with --to onnx"
            )
        with reading(self.folder / MANIFEST, "is no complete manifest of an exported graph", "export the model again"):
            self.rows, self.ends, self.piece = int(facts["rows"]), set(facts["ends"]), facts["piece"]
            self.settings, self.chat_template = dict(facts["settings"]), facts["chat_template"]
            self._state = {n: (tuple(x["shape"]), np.dtype(x["dtype"])) for n, x in facts["state"].items()}
        self.tokenizer = _Tokenizer(self.folder, self)
        self._sessions = {1: self._session("step", threads)}
        if self.piece:
            self._sessions[int(self.piece)] = self._session("prefill", threads)

    def _session(self, name: str, threads: int | None) -> Any:
        try:
            import onnxruntime
        except ImportError as error:
            raise InputError(
                f"{self.folder}: runs with onnxruntime, which is not installed: pip install 'linearize[onnx]'"
            ) from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 3
        file = self.folder / f"{name}.onnx"
        with reading(file, "cannot be opened by onnxruntime", "export the model again"):
            return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def empty(self, rows: int = 1) -> State:
        """The state of rows that have read nothing."""
        from onnxruntime import OrtValue

        make = OrtValue.ortvalue_from_numpy
        return {name: make(np.zeros((rows, *shape), dtype)) for name, (shape, dtype) in self._state.items()}

    def read(self, ids: Sequence[int] | np.ndarray, state: State) -> tuple[np.ndarray, State]:
        """Read tokens, in pieces as long as they last.

        Args:
            ids: of one text, or int64 [B, T] of several, at least one token.
            state: as `empty` or this method gives it; it stays as it is.

        Returns:
            Logits [B, vocabulary] of what follows, fp32, and the state behind.
        """
        from onnxruntime import OrtValue

        tokens, done = np.atleast_2d(np.asarray(ids, np.int64)), 0
        logits = None
        while done < tokens.shape[1]:
            take = max(length for length in self._sessions if length <= tokens.shape[1] - done)
            session = self._sessions[take]
            feed = {f"input.state.{name}": x for name, x in state.items()}
            feed["input_ids"] = OrtValue.ortvalue_from_numpy(np.ascontiguousarray(tokens[:, done : done + take]))
            names = ["logits", *(f"output.state.{name}" for name in state)]
            logits, *new = session.run_with_ort_values(names, feed)
            state, done = dict(zip(state, new, strict=True)), done + take
        return logits.numpy(), state  # type: ignore[union-attr]

    def write(
        self, ids: Sequence[int], state: State, choose: "Choice", limit: int, stream: TextIO | None
    ) -> tuple[list[int], State, list[float]]:
        """Write behind what is read now.

        Args:
            ids: int64 tokens to read first, at least one.
            state: what was read before.
            choose: the next token.
            limit: tokens at most.
            stream: where the text is written while it comes into being.

        Returns:
            The new tokens, the state of all but the last of them, and when each was there.
        """
        from tokenizers.decoders import DecodeStream

        decoding, new, times = DecodeStream(skip_special_tokens=True), [], [time.perf_counter()]
        seen = list(ids)
        while True:
            logits, state = self.read(ids, state)
            token = choose(logits[0], seen)
            new.append(token)
            seen.append(token)
            times.append(time.perf_counter())
            if stream is not None and (part := decoding.step(self.tokenizer.backend, token)):
                stream.write(plain(part, lines=True) if stream.isatty() else part)
                stream.flush()
            if token in self.ends or len(new) >= limit:
                if stream is not None:
                    stream.write("\n")
                return new, state, times
            ids = [token]


class Choice:
    """Takes the next token: the likeliest, or a sample, in the order of transformers' own processors.

    Args:
        settings: do_sample, temperature, top_k, top_p, min_p, repetition_penalty; others are not here.
        seed: of the samples.
    """

    def __init__(self, settings: dict[str, Any], seed: int | None):
        self.settings, self.random = settings, np.random.default_rng(seed)

    def __call__(self, logits: np.ndarray, seen: list[int]) -> int:
        """A token, out of fp32 logits [vocabulary] and the tokens before."""
        s, logits = self.settings, logits.astype(np.float64)
        if penalty := s.get("repetition_penalty"):
            before = np.unique(seen)
            logits[before] = np.where(logits[before] < 0, logits[before] * penalty, logits[before] / penalty)
        if not s.get("do_sample"):
            return int(logits.argmax())
        logits /= s.get("temperature") or 1.0
        if top_k := s.get("top_k"):
            logits[logits < np.partition(logits, -min(top_k, len(logits)))[-min(top_k, len(logits))]] = -np.inf
        share = np.exp(logits - logits.max())
        share /= share.sum()
        if top_p := s.get("top_p"):
            order = np.argsort(-share, kind="stable")
            share[order[np.cumsum(share[order]) - share[order] >= top_p]] = 0  # the first always stays
        if min_p := s.get("min_p"):
            share[share < min_p * share.max()] = 0
        return int(self.random.choice(len(share), p=share / share.sum()))


class GraphChat:
    """A conversation with a graph, as `linearize.Chat` with a model; arguments as of that."""

    def __init__(
        self, graph: Graph, *, system: str | None = None, max_new_tokens: int = 512,
        temperature: float | None = None, top_p: float | None = None, seed: int | None = None,
    ):  # fmt: skip
        if problems := wrong_settings("hello", max_new_tokens, temperature, top_p, None):
            raise InputError(f"chat: {'; '.join(problems)}")
        if not graph.chat_template:
            raise InputError("chat: the tokenizer has no chat template; give the text to continue as a prompt instead")
        self.graph, self.limit, self.choose = graph, max_new_tokens, _choice(graph, temperature, top_p, seed)
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []
        self._text, self._last, self._state = "", [], graph.empty()

    def say(self, content: str, stream: TextIO | None = None) -> Generation:
        """Send one message; `stream` and what is returned and raised as of `Chat.say`."""
        messages = [*self.messages, {"role": "user", "content": content}]
        rendered = agreed.render(self.graph.tokenizer, messages, add_generation_prompt=True)
        goes_on = bool(self._text) and rendered.startswith(self._text)
        read = agreed.numbers(self.graph.tokenizer, rendered[len(self._text) * goes_on :], self.graph.rows)
        ids = [*(self._last if goes_on else []), *read]
        state = self._state if goes_on else self.graph.empty()
        new, state, times = self.graph.write(ids, state, self.choose, self.limit, stream)
        answer = self.graph.tokenizer.decode(new)
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        self._text, self._last, self._state = rendered + self.graph.tokenizer.decode(new, False), new[-1:], state
        return _report([answer], [len(read)], [len(new)], [times])


def generate(
    folder: str | Path, prompt: str | Sequence[str] | Sequence[Message], *,
    system: str | None = None, max_new_tokens: int = 256, temperature: float | None = None, top_p: float | None = None,
    seed: int | None = None, raw: bool = False, stream: TextIO | None = None, **others: Any,
) -> Generation:  # fmt: skip
    """Continue prompts with an exported graph; arguments and result as of `linearize.generate`.

    Raises:
        InputError: as that raises it, and for options that only a model in transformers has.
    """
    problems = wrong_settings(prompt, max_new_tokens, temperature, top_p, stream) + _unknown(others)
    prompt = asked(prompt, system, problems)
    graph = Graph(folder)
    ids = [
        agreed.numbers(graph.tokenizer, each, graph.rows, special)
        for each, special in agreed.prompts(prompt, graph.tokenizer, raw)
    ]
    choose = _choice(graph, temperature, top_p, seed)
    written = [graph.write(each, graph.empty(), choose, max_new_tokens, stream) for each in ids]
    answers = [graph.tokenizer.decode(new) for new, _, _ in written]
    return _report(answers, [len(each) for each in ids], [len(new) for new, _, _ in written], [t for *_, t in written])


def chat(
    folder: str | Path, lines: Iterator[str], out: TextIO, settings: dict[str, Any], others: dict[str, Any]
) -> None:
    """Talk on a terminal.

    Args:
        folder: of the graph.
        lines: what the user types.
        out: where prompts and answers are written.
        settings: arguments of `GraphChat`.
        others: options that only a model in transformers has.

    Raises:
        InputError: one of them is set; or as `GraphChat`.
    """
    if problems := _unknown(others):
        raise InputError(f"generate: {'; '.join(problems)}")
    talk(GraphChat(Graph(folder), **settings), lines, out)


def _unknown(options: dict[str, Any]) -> list[str]:
    names = sorted(name for name, value in options.items() if value)
    problem = f"{', '.join(names)}: a graph has no such thing; run the folder that it was exported from"
    return [problem] if names else []


def _choice(graph: Graph, temperature: float | None, top_p: float | None, seed: int | None) -> Choice:
    settings = dict(graph.settings)
    if temperature is not None:
        settings |= {"do_sample": temperature > 0, "temperature": temperature}
    if top_p is not None:
        settings["top_p"] = top_p
    return Choice(settings, seed)


def _report(answers: list[str], read: list[int], new: list[int], times: list[list[float]]) -> Generation:
    prefill = sum(each[1] - each[0] for each in times)
    seconds = sum(each[-1] - each[0] for each in times)
    rate = (sum(new) - len(new)) / max(seconds - prefill, 1e-9)
    return Generation(answers, read, new, prefill, seconds, rate)


class _Tokenizer:
    """What `checkpoint.text` asks of a tokenizer of transformers, by the package tokenizers and the manifest."""

    def __init__(self, folder: Path, graph: Graph):
        from tokenizers import Tokenizer

        file = folder / "tokenizer.json"
        with reading(file, "the tokenizer cannot be read", "export the model again"):
            self.backend = Tokenizer.from_file(str(file))
        self.backend.no_truncation()
        self.backend.no_padding()
        self.chat_template, self._tokens = graph.chat_template, graph.facts.get("special_tokens") or {}

    def __call__(self, text: str, add_special_tokens: bool) -> Any:
        return SimpleNamespace(input_ids=self.backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def convert_ids_to_tokens(self, number: int) -> str | None:
        return self.backend.id_to_token(number)

    def apply_chat_template(self, messages: list[Message], tokenize: bool, add_generation_prompt: bool) -> str:
        """As of transformers' method: its environment of jinja, sandboxed, with the same names in it."""
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def complain(message: str) -> None:
            raise ValueError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = complain
        environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
        template = environment.from_string(str(self.chat_template))
        return template.render(
            messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **self._tokens
        )


def _to_json(x: Any, **options: Any) -> str:
    return json.dumps(x, **{"ensure_ascii": False, **options})
