"""What tests of several files share about selection."""

import json
from pathlib import Path

import pytest
import torch
from helpers.tiny import save_source, tiny_model
from torch.nn import functional as F

from linearize.checkpoint.sources import locate
from linearize.conversion.convert import convert
from linearize.model.modeling import linearize_
from linearize.recipe import load as recipes
from linearize.recovery.calibrate import calibrate

GLA = {"name": "gla", "window": 8, "sinks": 2}
LAYERS = 4


@pytest.fixture(scope="module")
def model():
    return linearize_(tiny_model("llama", LAYERS), GLA)


@pytest.fixture
def ids():
    return torch.randint(3, 384, (2, 48))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a source, a recipe for it, and its folder, converted and calibrated: with new weights in each layer."""
    folder = tmp_path_factory.mktemp("select")
    source = save_source(folder / "source", layers=LAYERS)
    lines = (json.dumps({"text": f"The river rose for {i} days and nobody minded. " * 9}) for i in range(20))
    (folder / "text.jsonl").write_text("\n".join(lines))
    wanted = recipes.from_dict(
        {
            "source": {"id": str(source)},
            "convert": {"mixer": {"name": "gla", "window": 8, "sinks": 2}},
            "data": [{"path": str(folder / "text.jsonl")}],
            "select": {"keep": 2, "tokens": 96, "seq_len": 48},
            "train": [{"tokens": 128, "seq_len": 64, "batch": 1, "peft": {"r": 2}}],
        }
    )
    convert(locate(str(source)), wanted, folder / "converted")
    calibrate(folder / "converted", wanted, folder / "calibrated", tokens=128, seq_len=64)
    (folder / "wanted.yaml").write_text(recipes.to_yaml(wanted))
    return folder


@pytest.fixture
def wanted(work: Path) -> recipes.Recipe:
    return recipes.load(work / "wanted.yaml")


@torch.no_grad()
def plain_kl(ids, replaced) -> float:
    """Of a model that was converted in these layers only, written out."""
    source = tiny_model("llama", LAYERS)
    p = source(ids, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    q = linearize_(source, GLA, replaced)(ids, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    return float(F.kl_div(q, p, log_target=True, reduction="sum")) / p[..., 0].numel()
