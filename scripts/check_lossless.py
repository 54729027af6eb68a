"""Rollback on a real model: eval/results/check-lossless.json and .md.

For many prompts, of lengths around the window, the sinks and what can be taken back: lossless mode writes what the
source writes, with any number of drafts; the student with prompt lookup, and the student drafted by its source, write
what the student writes. Where a text differs, how near a tie the two tokens were in the logits of the model itself.

    python scripts/check_lossless.py --folder runs/smollm2-135m-best/0-converted --prompts 200
"""

import random
from typing import Any

import bench_common as common
import torch
from bench_common import Cell
from transformers import DynamicCache

import linearize
from linearize.generation.lossless import Lossless
from linearize.model.branches import branches
from linearize.progress import step_progress

NEW = 16
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def gap(model: Any, ids: torch.Tensor, expected: list[int], written: list[int]) -> float:
    """Between the logits of the two tokens at which texts part, in the model's own pass over what they share."""
    at = next(index for index, pair in enumerate(zip(expected, written, strict=True)) if pair[0] != pair[1])
    whole = torch.cat([ids, ids.new_tensor([expected[:at]])], 1)
    logits = model(whole, past_key_values=DynamicCache()).logits[0, -1].float()
    return abs(float(logits[expected[at]] - logits[written[at]]))


@torch.no_grad()
def check(model: Any, ids: torch.Tensor, drafts: int) -> list[tuple[str, float | None]]:
    """Way -> None where the text is the same, else how near a tie it was."""
    P = ids.shape[1]

    def new(of: Any, **how: Any) -> list[int]:
        return of.generate(ids, return_dict_in_generate=True, **GREEDY, **how).sequences[0, P:].tolist()

    with branches(model, "source"):
        source = new(model)
    student = new(model)
    ways = []
    written = new(Lossless(model, always=drafts))
    with branches(model, "source"):
        ways.append(("lossless", None if written == source else gap(model, ids, source, written)))
    for way, how in (("lookup", {"prompt_lookup_num_tokens": drafts}), ("early exit", {"assistant_early_exit": 20})):
        written = new(model, **how)
        ways.append((way, None if written == student else gap(model, ids, student, written)))
    return ways


def main() -> None:
    """Check, write, print."""
    parser = common.options(__doc__, name="check-lossless")
    parser.add_argument("--folder", required=True, help="an untrained linearized folder, or adapters")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    results, target = common.begin(given)
    model, tokenizer = linearize.load(given.folder, given.dtype)
    text = tokenizer(common.validation_text()[:400000], verbose=False)["input_ids"]
    rng, cells = random.Random(given.seed), []
    with step_progress("prompts", given.prompts) as advance:
        for _ in range(given.prompts):
            length, drafts = rng.choice([*range(1, 12), *range(56, 112), 200, 400]), rng.randint(1, 12)
            start = rng.randrange(len(text) - length)
            ids = torch.tensor([text[start : start + length]])
            for way, tie in check(model, ids, drafts):
                cells.append({"way": way, "length": length, "drafts": drafts, "same": tie is None, "gap": tie})
            advance()
    results["cells"] = cells
    ways = list(dict.fromkeys(cell["way"] for cell in cells))
    rows = []
    for way in ways:
        own: list[Cell] = [cell for cell in cells if cell["way"] == way]
        gaps = [cell["gap"] for cell in own if not cell["same"]]
        rows.append((way, str(len(own)), str(sum(cell["same"] for cell in own)), f"{max(gaps, default=0):.2g}"))
    common.save(results, target)
    head = ("way", "prompts", "same text", "largest gap of logits where not")
    note = f"{NEW} greedy tokens behind prompts of 1 to 400 tokens of WikiText-2 validation, {given.dtype}."
    common.write_markdown([note, *common.table(head, rows)], target)


if __name__ == "__main__":
    main()
