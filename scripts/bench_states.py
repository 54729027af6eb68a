"""What kept states save: tokens of an edited conversation that are read again, and the time of resuming from disk.

    python scripts/bench_states.py                                       # some minutes on two cores
    python scripts/bench_states.py --tokens 600 --turns 4 --answer 4     # a look

The recipe's model is converted and not trained, which changes nothing about what is read. A conversation of --tokens
tokens in --turns turns, each second of which is edited and answered again, is held without a store, with one in memory
and with one in a folder. Then a text of --tokens tokens is read, its state is saved, and the file is opened.

Writes eval/results/bench-states.json, and a table (.md) beside it.
"""

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench_common as common
import torch
from bench_common import Cell, Claim

from linearize import load_state, save_state
from linearize.checkpoint.open import load
from linearize.conversion.convert import convert
from linearize.evaluation.clock import timed
from linearize.generation import Chat, StateStore
from linearize.recipe import load as recipes

SYSTEM = "You are a helpful reader."
KINDS = ("none", "memory", "folder")


def said(tokenizer: Any, given: argparse.Namespace) -> list[str]:
    """A message for each turn, and one for each edit: pieces of real text, as long as the conversation wants."""
    ids = tokenizer(common.validation_text()[: 40 * given.tokens]).input_ids
    size = max(given.tokens // given.turns - given.answer - 10, 8)
    edits = given.turns // 2
    starts = [turn * size for turn in range(given.turns)] + [given.turns * size + 9 * n for n in range(edits)]
    return [tokenizer.decode(ids[start : start + size]) for start in starts]


def part_chat(model: Any, tokenizer: Any, folder: Path, given: argparse.Namespace) -> Iterator[Cell]:
    """Tokens that are read in the conversation, and how many of them were no new ones."""
    texts = said(tokenizer, given)
    turns, before = texts[: given.turns], len(_rendered(tokenizer, []))
    new = before + sum(len(_rendered(tokenizer, [text])) - before for text in texts)
    for kind in KINDS:
        store = None if kind == "none" else StateStore(1 << 32, folder / "store" if kind == "folder" else None)
        talk = Chat(model, tokenizer, system=SYSTEM, max_new_tokens=given.answer, temperature=0, store=store)
        answers, changed = [], iter(texts[given.turns :])
        for turn, text in enumerate(turns):
            answers.append(talk.say(text))
            if turn % 2:
                answers.append(talk.edit(len(talk.messages) - 2, next(changed)))
        read = sum(answer.prompt_tokens[0] for answer in answers)
        seconds = sum(answer.prefill_seconds for answer in answers)
        held = {} if store is None else {"store_bytes": store.nbytes}
        cell = {"part": "chat", "store": kind, "read": read, "new": new, "again": max(read - new, 0)}
        yield cell | {"seconds": seconds} | held


def _rendered(tokenizer: Any, texts: list[str]) -> list[int]:
    messages = [{"role": "system", "content": SYSTEM}, *({"role": "user", "content": text} for text in texts)]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=bool(texts)).input_ids


@torch.no_grad()
def part_resume(model: Any, tokenizer: Any, folder: Path, given: argparse.Namespace) -> Iterator[Cell]:
    """Seconds of reading a text, and of opening the state behind it."""
    ids = torch.tensor([tokenizer(common.validation_text()[: 40 * given.tokens]).input_ids[: given.tokens]])
    output, seconds = timed(lambda: model(ids, use_cache=True, logits_to_keep=1), model.device)
    yield {"part": "resume", "kind": "read", "seconds": seconds}
    file = folder / "state.safetensors"
    _, seconds = timed(lambda: save_state(output.past_key_values, ids, model, file), model.device)
    yield {"part": "resume", "kind": "save", "seconds": seconds, "bytes": file.stat().st_size}
    times = [timed(lambda: load_state(file, model), model.device)[1] for _ in range(given.repeats)]
    yield {"part": "resume", "kind": "load", "seconds": statistics.median(times)}


def claims(cells: list[Cell]) -> list[Claim]:
    """The numbers that the product promises, where this run has measured what they need."""
    made = []
    for kind in KINDS[1:]:
        name = f"tokens read again, store in {kind} over none"
        made += common.ratio(cells, name, "≤ 0.05", "again", {"store": kind}, {"store": "none"}, part="chat")
    name, load_, read = "time of opening a state over reading its text", {"kind": "load"}, {"kind": "read"}
    return made + common.ratio(cells, name, "≤ 0.02", "seconds", load_, read, part="resume")


def markdown(results: dict[str, Any]) -> list[str]:
    """Lines: the conversation by store, the text by what is done with it, claims."""
    cells, machine, given = results["cells"], results["environment"], results["settings"]
    chats = [cell for cell in cells if cell["part"] == "chat"]
    rows = [
        [
            *(cell["store"], str(cell["read"]), str(cell["again"]), f"{cell['seconds']:.1f}"),
            common.shown(cell.get("store_bytes"), ".1f", 2.0**-20),
        ]
        for cell in chats
    ]
    lines = [
        f"States of {results['recipe']}: {machine['cpu']}, {machine['threads']} threads, commit {machine['commit']}.",
        f"A conversation of {given['turns']} turns and {given['tokens']} tokens, each second turn edited: tokens "
        "that are read,",
        "those of them that were no new ones, seconds until the answers begin, MiB of the store.",
        *common.table(("store", "read", "again", "s", "MiB"), rows),
    ]
    resumed = [cell for cell in cells if cell["part"] == "resume"]
    rows = [
        [cell["kind"], f"{cell['seconds']:.3f}", common.shown(cell.get("bytes"), ".1f", 2.0**-20)] for cell in resumed
    ]
    lines += ["", f"A text of {given['tokens']} tokens:", *common.table(("", "s", "MiB"), rows)]
    return lines + common.claims_table(results["claims"], "batch 1")


def main() -> None:
    """Measure, write, print."""
    parser = common.options(__doc__, "smollm2-135m-best", "bench-states")
    parser.add_argument("--tokens", type=int, default=6000, help="of the conversation, and of the text")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--answer", type=int, default=24, help="tokens of an answer")
    parser.add_argument("--repeats", type=int, default=5, help="how often the state is opened")
    given = parser.parse_args()
    (results, target), wanted = common.begin(given), recipes.load(given.recipe, given.set)
    results |= {"recipe": given.recipe, "source": wanted.source.id, "mixer": dict(wanted.convert.mixer)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, tokenizer = load(convert(common.source_of(wanted), wanted, folder / "converted"), device="cpu")
        for part in (part_resume, part_chat):
            common.collect(results, part(model, tokenizer, folder, given), claims, target)
    common.write_markdown(markdown(results), target)


if __name__ == "__main__":
    main()
