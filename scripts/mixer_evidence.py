"""Whether each mixer beats the window control, from the committed results: linearize/conversion/evidence.json.

    python scripts/mixer_evidence.py

The control is the same model with plain windows in the place of its mixers; where a mixer was trained, the better of
the source's windows and the trained student's. A trained model counts before a calibrated one, and that before one that
was only converted; of several results of a kind the one with the shortest file name, as variants have longer ones.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from linearize.conversion.costs import EVIDENCE
from linearize.model.mixers import MIXERS

ROOT = Path(__file__).parents[1]
STAGES = ("converted", "calibrated", "trained")
LENGTH = "512"
"""Tokens of the blocks on which `scripts/experiments.py quality` measures models that were not trained."""


def measured(file: Path) -> Iterator[tuple[str, str, float, float]]:
    """(mixer, stage, perplexity, the control's perplexity) for all that a file says."""
    content = json.loads(file.read_text(encoding="utf-8"))
    columns, layers = content.get("columns"), content.get("layers")
    if layers and {(layer["mixer"], layer.get("combine"), "softmax_heads" in layer) for layer in layers} == {
        (layers[0]["mixer"], "memory", False)  # one mixer in all layers, and as a memory: else it is another model
    }:
        values = {name: (column.get("perplexity") or {}).get("value") for name, column in columns.items()}
        windows = [values[name] for name in ("window", "student/window") if values.get(name)]
        if values.get("student") and windows:
            yield layers[0]["mixer"], "trained", values["student"], min(windows)
    elif isinstance(columns, dict) and "perplexity" in columns.get("window", {}) and not layers:
        for name, column in columns.items():
            for stage, values in (("converted", column), ("calibrated", column.get("calibrated"))):
                if values and name in MIXERS and name != "window":
                    yield name, stage, values["perplexity"][LENGTH], columns["window"]["perplexity"][LENGTH]


def evidence() -> dict[str, dict[str, Any]]:
    """Mixer -> perplexity, window, change of the first from the second, and the result that says so."""
    best: dict[str, tuple[int, dict[str, Any]]] = {}
    for file in sorted((ROOT / "eval" / "results").glob("*.json"), key=lambda file: (len(file.name), file.name)):
        for name, stage, perplexity, window in measured(file):
            if name not in best or STAGES.index(stage) > best[name][0]:
                row = {"perplexity": round(perplexity, 4), "window": round(window, 4)}
                row |= {"change": round(perplexity / window - 1, 5), "result": f"{stage}: eval/results/{file.name}"}
                best[name] = STAGES.index(stage), row
    return {name: best[name][1] for name in MIXERS if name in best}


if __name__ == "__main__":
    EVIDENCE.write_text(json.dumps(evidence(), indent=1) + "\n")
