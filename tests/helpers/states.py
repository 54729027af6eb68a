"""Models whose states are saved here and opened in another process; `python states.py FOLDER` goes on from each."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from linearize.model.mixers import MIXERS
from linearize.model.modeling import linearize_

W, READ = 8, 45
CASES: dict[str, dict[str, Any]] = {name: {"name": name} for name in MIXERS}
CASES |= {f"{name} taken back": {"name": name, "back": 5} for name in ("gla", "kda", "clusters", "window")}
CASES |= {
    "liger": {"name": "gla", "combine": "liger"},
    "none": {"name": "retnet", "combine": "none"},
    "softmax heads": {"name": "gla", "softmax_heads": [1]},
    "softmax heads taken back": {"name": "gla", "softmax_heads": [0], "back": 5},
    "sliding layers": {"name": "gla", "source": "gemma3_text", "sliding_window": 16},
    "sliding layers taken back": {"name": "gla", "source": "gemma3_text", "sliding_window": 16, "back": 3},
    "sliding layers, short": {"name": "gla", "source": "gemma3_text", "sliding_window": 300},
    "bf16": {"name": "gla", "dtype": torch.bfloat16},
    "a state in int8": {"name": "gla", "state_dtype": "int8"},
    "clusters in int4, taken back": {"name": "clusters", "state_dtype": "int4", "clusters": 16, "back": 5},
    "a short text": {"name": "gla", "read": 3},
}


def model_of(
    name: str, source: str = "llama", dtype: torch.dtype = torch.float32, back: int = 0, read: int = READ, **values: Any
) -> Any:
    """The model of a case, the same in every process: layers that stay softmax beside linearized ones."""
    changes = {"sliding_window": values.pop("sliding_window")} if "sliding_window" in values else {}
    combine = "memory" if "memory" in MIXERS[name].combines else "none"
    mixer = {"name": name, "combine": combine, "window": W, "sinks": 2, **values}
    from helpers.tiny import tiny_model

    model: Any = tiny_model(source, **changes)
    layers = None if source != "llama" else [0, 2, 3]
    torch.manual_seed(3)
    linearize_(model, mixer, layers=layers).eval().to(dtype)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter, value in model.named_parameters():
            if parameter.endswith("gate"):
                value.fill_(0.7)
    return model


def text(length: int, seed: int = 0) -> Tensor:
    """Tokens [1, length]."""
    return torch.randint(3, 380, (1, length), generator=torch.Generator().manual_seed(seed))


def read(model: PreTrainedModel, back: int = 0, read: int = READ, **_: Any) -> tuple[Cache, Tensor]:
    """A cache that has read the text of a case, of which some last tokens may have been taken back."""
    with torch.no_grad():
        cache = model(text(read), use_cache=True).past_key_values
        if back:
            cache.activate_past_recording()
            for token in range(back + 3):
                model(text(read + 20)[:, read + token : read + token + 1], past_key_values=cache)
            cache.crop(-back)
    return cache, text(read + 20)[:, : int(cache.get_seq_length())] if back else text(read)


def go_on(model: PreTrainedModel, cache: Cache) -> Tensor:
    """Logits of tokens one by one, of a block, and of one more."""
    new = text(30, seed=1)
    with torch.no_grad():
        parts = [*(new[:, i : i + 1] for i in range(12)), new[:, 12:29], new[:, 29:]]
        return torch.cat([model(part, past_key_values=cache).logits for part in parts], 1)


if __name__ == "__main__":
    from linearize.checkpoint.states import load_state

    folder = Path(sys.argv[1])
    answers = {}
    for number, case in enumerate(CASES.values()):
        model = model_of(**case)
        answers[number] = go_on(model, load_state(folder / f"{number}.safetensors", model)[0])
    torch.save(answers, folder / "answers.pt")
