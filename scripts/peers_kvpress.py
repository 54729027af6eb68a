"""What kvpress's presses answer and predict behind a compressed context; started by scripts/peers.py.

It runs in an environment of its own, which has kvpress and no linearize. A context is read once with full attention,
as every press does it: each press then compresses the keys and values of each layer as its own forward hook would, and
answers from what it kept. CAM compresses while it decodes, so it reads what lies beyond the budget token by token.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

FULL, OBSERVED, CAM = "full cache", "H2O-like (ObservedAttention)", "CAM"


def outcome(logits: Tensor, item: dict[str, Any]) -> dict[str, Any]:
    """What one item says of a model.

    Args:
        logits: [tokens, vocabulary], of `item["ids"]` behind the context.
        item: `spans`: where answers begin and end in `ids`; without them, all of `ids` is text that goes on.

    Returns:
        `score`: share of the answers that greedy decoding writes, given all before; or `loss`: mean nats per token.
    """
    ids = torch.tensor(item["ids"])
    if "spans" not in item:
        return {"loss": F.cross_entropy(logits[:-1].float(), ids[1:]).item()}
    chosen = logits.argmax(-1)
    right = [torch.equal(chosen[start - 1 : end - 1], ids[start:end]) for start, end in item["spans"]]
    return {"score": sum(right) / len(right)}


def presses() -> dict[str, Any]:
    """Name -> press, with kvpress's own defaults."""
    import kvpress as kv

    return {
        "StreamingLLM": kv.StreamingLLMPress(),
        "SnapKV": kv.SnapKVPress(),
        "ExpectedAttention": kv.ExpectedAttentionPress(),
        "KeyDiff": kv.KeyDiffPress(),
        "TOVA": kv.TOVAPress(),
        "Merging (SnapKV)": kv.MergingPress(press=kv.SnapKVPress()),
        OBSERVED: kv.ObservedAttentionPress(),
    }


@contextmanager
def compressed_into(model: Any, chosen: dict[str, Any], caches: dict[str, Any], kept: int) -> Iterator[None]:
    """While a context is read, give each press what its own hook would, and put what it keeps into its cache."""

    def hook(module: Any, _: Any, kwargs: dict[str, Any], output: Any) -> None:
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        length = layer.keys.shape[2]
        for name, press in chosen.items():
            press.compression_ratio = max(0.0, 1 - (kept + 0.5) / length)
            weights = output[1] if name == OBSERVED else None
            pair = press.compress(module, kwargs["hidden_states"], layer.keys, layer.values, weights, kwargs)
            caches[name].update(*pair, module.layer_idx)

    for press in chosen.values():
        press.post_init_from_model(model)
    for layer in model.model.layers:
        layer.self_attn.rotary_emb = model.model.rotary_emb
    hooks = [layer.self_attn.register_forward_hook(hook, with_kwargs=True) for layer in model.model.layers]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


def behind(model: Any, cache: Any, item: dict[str, Any]) -> dict[str, Any]:
    """Outcome of an item whose context a cache holds; its tokens keep the positions that they have in the text."""
    start, ids = len(item["context"]), torch.tensor([item["ids"]])
    positions = torch.arange(start, start + ids.shape[1])[None]
    logits = model(input_ids=ids, past_key_values=cache, position_ids=positions).logits[0]
    return outcome(logits, item) | {"kept": cache.get_seq_length() - ids.shape[1]}


def by_presses(model: Any, item: dict[str, Any], kept: int, names: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Outcomes of the full cache and of presses that compress after reading; the context is read once."""
    from transformers import DynamicCache

    chosen = {name: press for name, press in presses().items() if name in names}
    caches = {name: DynamicCache() for name in chosen}
    full = DynamicCache()
    model.set_attn_implementation("eager" if OBSERVED in chosen else "sdpa")
    with compressed_into(model, chosen, caches, kept):
        model.model(input_ids=torch.tensor([item["context"]]), past_key_values=full)
    model.set_attn_implementation("sdpa")
    yield FULL, behind(model, full, item)
    for name, cache in caches.items():
        assert cache.get_seq_length() == min(kept, len(item["context"])), (name, cache.get_seq_length())
        yield name, behind(model, cache, item)


def by_cam(model: Any, item: dict[str, Any], kept: int) -> dict[str, Any]:
    """Outcome of CAM as published: after the first `kept` tokens, each new one merges and evicts one."""
    import kvpress as kv
    from transformers import DynamicCache

    torch.manual_seed(0)  # it draws which values are merged
    press = kv.CAMPress(base_press=kv.TOVAPress(), compression_interval=1, target_size=kept)
    cache, ids = DynamicCache(), torch.tensor([item["context"]])
    with press(model):
        model.model(input_ids=ids[:, :kept], past_key_values=cache)
        for t in range(kept, ids.shape[1]):
            model.model(input_ids=ids[:, t : t + 1], past_key_values=cache, position_ids=torch.tensor([[t]]))
    return behind(model, cache, item)


@torch.inference_mode()
def main() -> None:
    """Answer the items of a file, as one JSON object says; a line per item and press, each kept for the next start."""
    from transformers import AutoModelForCausalLM

    task = json.loads(sys.argv[1])
    items = json.loads(Path(task["items"]).read_text())
    torch.set_num_threads(task["threads"])
    model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.float32).eval()
    target = Path(task["answers"])
    lines = target.read_text().splitlines() if target.exists() else []
    done = {(line["id"], line["system"]) for line in map(json.loads, lines)}
    with target.open("a") as file:
        # CAM last: an item of it takes as long as ten of all others.
        for item, cam in [(item, False) for item in items] + [(item, True) for item in items if item["cam"]]:
            short = len(item["context"]) <= task["observed_up_to"]
            wanted = [FULL, *(name for name in task["presses"] if name != CAM and (short or name != OBSERVED))]
            missing = [name for name in ([CAM] if cam else wanted) if (item["id"], name) not in done]
            if not missing or (cam and CAM not in task["presses"]):
                continue
            began = time.perf_counter()
            found = (
                [(CAM, by_cam(model, item, task["kept"]))] if cam else by_presses(model, item, task["kept"], missing)
            )
            for name, answer in found:
                if name in missing:
                    file.write(json.dumps({"id": item["id"], "system": name, **answer}) + "\n")
            file.flush()
            print(f"peers: {item['id']}{', CAM' * cam}: {time.perf_counter() - began:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
