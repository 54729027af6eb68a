"""Perplexity against tokens of several ways to convert and train one source, on the same text with the same budget.

    python scripts/learning_curves.py                                    # eight variants: over an hour on two cores
    python scripts/learning_curves.py --only "memory + lm,memory + kl" --every 16 --blocks 4 --name short
    python scripts/learning_curves.py --variants mine.yaml --set train.distil.seed=1 --name seed-1

The file of variants names a recipe and, for each variant, what is changed of it by dotted keys. A variant is converted,
calibrated if its recipe says so and trained stage by stage, as `linearize run` does it; perplexity on the embedded
validation half of WikiText-2 is taken before the first step, after steps 1, 2, 4, … and then every --every steps of
each stage. Variants that read other data or train on another number of tokens are refused: such curves say nothing.
Tokens are those that were read, calibration included.

Writes eval/results/NAME.json after every variant, and a table (.md) and a plot (.png, if matplotlib is installed)
beside it. Variants that are finished there with the same recipe are kept.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from bench_common import validation_text
from torch import Tensor
from transformers import AutoTokenizer
from zero_training import value

from linearize.checkpoint import adapters, companions
from linearize.checkpoint.sources import Located, load_source, load_tokenizer, locate
from linearize.conversion.convert import convert
from linearize.conversion.plan import plan
from linearize.errors import InputError, suggest
from linearize.evaluation import perplexity
from linearize.evaluation.clock import timed
from linearize.evaluation.environment import commit, environment
from linearize.model.architectures import attention_layers
from linearize.model.modeling import linearize_
from linearize.recipe import load as recipes
from linearize.recipe.load import Recipe
from linearize.recovery.calibrate import calibrate
from linearize.recovery.data import blocks
from linearize.recovery.loop import Loop

Point = dict[str, Any]
NEAR = 1.6
"""Of the source's perplexity: what the second panel shows."""
HERE = Path(__file__).parent

# --- variants ---------------------------------------------------------------------------------------------------------


def variants(path: Path, overrides: list[str], only: list[str] | None) -> dict[str, Recipe]:
    """Name -> recipe.

    Raises:
        InputError: the file is no list of variants, a recipe in it is wrong, or variants cannot be compared.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        named = {str(name): dict(changes or {}) for name, changes in raw["variants"].items()}
        base = raw["recipe"]
    except (OSError, yaml.YAMLError, TypeError, KeyError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path}: found no variants ({' '.join(str(error).split())}); expected a YAML file with recipe: NAME and "
            "variants: {NAME: {dotted.key: value}}"
        ) from error
    for name in only or []:
        if name not in named:
            raise InputError(f"--only: unknown variant {name!r}. {suggest(name, named)}")
    shared = dict(text.partition("=")[::2] for text in overrides)
    found = {name: recipes.load(base, {**named[name], **shared}) for name in only or named}
    first = next(iter(found.values()))
    for name, wanted in found.items():
        for key, mine, theirs in (
            ("source", wanted.source, first.source),
            ("data", wanted.data, first.data),
            ("tokens of all stages", trained(wanted), trained(first)),
        ):
            if mine != theirs:
                raise InputError(f"{path}: {name}: {key}: found {mine}, other variants have {theirs}; make them equal")
        if any(stage.keep != "last" for stage in wanted.train):
            raise InputError(f"{path}: {name}: keep: a curve shows every moment of a run; leave it at last")
    return found


def trained(wanted: Recipe) -> int:
    """Tokens of all training stages: whole steps."""
    return sum(stage.tokens // (stage.batch * stage.seq_len) * stage.batch * stage.seq_len for stage in wanted.train)


def control(located: Located, wanted: Recipe) -> tuple[str, dict[str, Any], list[int]]:
    """The window control that a variant is to be below: its name, its mixer, its layers."""
    found = plan(located, wanted)
    window, sinks = found.mixer["window"], found.mixer["sinks"]
    kept = f", softmax in {', '.join(map(str, found.kept))}" if found.kept else ""
    return f"window {window}, {sinks} sinks{kept}", {"name": "window", "window": window, "sinks": sinks}, found.layers


# --- measuring --------------------------------------------------------------------------------------------------------


def moments(steps: int, every: int) -> set[int]:
    """Steps after which perplexity is taken: a curve falls fastest at its start."""
    doubling = {2**i for i in range(every.bit_length()) if 2**i < min(every, steps)}
    return doubling | set(range(every, steps, every)) | {steps}


def lines(located: Located, wanted: list[Recipe], ids: Tensor) -> dict[str, float]:
    """Perplexity of what needs no training: the source, and the window control of each variant."""
    source, _ = load_source(located, "float32")
    found = {"source": value(source, ids)}
    for name, mixer, layers in (control(located, each) for each in wanted):
        if name not in found:
            # Back to the source first: the control before may have had other layers.
            linearize_(source, {"name": "softmax"}, list(attention_layers(source)))
            found[name] = value(linearize_(source, mixer, layers), ids)
    return found


def curve(wanted: Recipe, located: Located, ids: Tensor, every: int) -> Iterator[Point]:
    """Run a variant; a point is {stage, tokens, perplexity, seconds}, seconds being those of the training so far."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        folder, read, seconds = convert(located, wanted, place / "0-converted"), 0, 0.0
        if wanted.calibrate:
            folder, read = calibrate(folder, wanted, place / "0-calibrated"), wanted.calibrate.tokens
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for number, stage in enumerate(wanted.train, 1):
            per_step = stage.batch * stage.seq_len
            steps = stage.tokens // per_step
            data = blocks(wanted.data, tokenizer, stage.seq_len, steps * stage.batch, stage.seed, stage.watch > 0)
            accelerator = Accelerator(mixed_precision="no", cpu=not torch.accelerator.is_available())
            loop = Loop(accelerator, stage, folder, data, steps)
            for step in range(steps + 1):
                if step:
                    seconds += timed(partial(loop.step, step, None), accelerator.device)[1]
                if step in moments(steps, every) or (step == 0 and number == 1):
                    loop.plain.eval()
                    with loop.autocast():
                        found = value(loop.plain, ids)
                    loop.plain.train()
                    tokens = read + step * per_step
                    yield {"stage": stage.name, "tokens": tokens, "perplexity": found, "seconds": round(seconds, 1)}
            read += steps * per_step
            after = place / f"{number}-{stage.name}"
            after.mkdir()
            companions.carry(folder, after)
            adapters.save(loop.plain, loop.weights(), folder, after)
            folder = after


# --- the report -------------------------------------------------------------------------------------------------------


def markdown(results: dict[str, Any]) -> str:
    machine, measured, source = results["environment"], results["measured"], results["lines"]["source"]
    lines = [
        f"Perplexity of {results['recipe']} by tokens read: WikiText-2 validation, {measured['blocks']} blocks of "
        f"{measured['length']} tokens; {machine['cpu']}, {machine['threads']} threads, commit {machine['commit']}.",
        "The source reads the same blocks; below is where a curve first passes the window control of its own W and "
        "sinks.",
        "",
        "| | calibrated on | trained on | before | half way | end | of the source | below its window after | minutes |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, found in results["lines"].items():
        lines.append(f"| {name} | | | | | {found:.2f} | {found / source:.3f}× | | |")
    for name, variant in results["variants"].items():
        points, limit = variant["points"], results["lines"][variant["control"]]
        first, last = points[0], points[-1]
        half = min(points, key=lambda point: abs(2 * point["tokens"] - first["tokens"] - last["tokens"]))
        below = next((f"{point['tokens']:,}" for point in points if point["perplexity"] < limit), "never")
        row = [f"{first['tokens']:,}", f"{last['tokens'] - first['tokens']:,}"]
        row += [f"{point['perplexity']:.2f}" for point in (first, half, last)]
        row += [f"{last['perplexity'] / source:.3f}×", below, f"{last['seconds'] / 60:.1f}"]
        lines.append(f"| {name} | {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """Curves over tokens; source and window controls are horizontal lines."""
    try:
        from matplotlib.figure import Figure

        from linearize.reporting.plot import COLOURS
    except ImportError:
        return print("no plot: matplotlib is not installed", file=sys.stderr)
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    whole, near = figure.subplots(1, 2)
    # Linear up to the first step, so that a curve that begins at no token has a place for it.
    linear = min(point["tokens"] for variant in results["variants"].values() for point in variant["points"][1:])
    for axes in (whole, near):
        # The source first; another style for every window control, of which there are few. Colours are for the curves.
        for (name, found), style in zip(results["lines"].items(), cycle(("-", "--", ":", "-."))):
            axes.axhline(found, color=COLOURS["source"], linestyle=style, linewidth=1.5, label=name)
        for name, variant in results["variants"].items():
            tokens, found = ([point[key] for point in variant["points"]] for key in ("tokens", "perplexity"))
            axes.plot(tokens, found, "o-", markersize=3, label=name)
        axes.set_xscale("symlog", base=2, linthresh=linear)
        axes.set(xlabel="tokens read", ylabel="perplexity, WikiText-2")
    source = results["lines"]["source"]
    whole.set_yscale("log")
    whole.set_title(f"{results['recipe']}: learning curves")
    near.set_ylim(0.97 * source, NEAR * source)
    near.set_title("near the source")
    figure.legend(*whole.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", type=Path, default=HERE / "learning_curves.yaml", help="(default: %(default)s)")
    parser.add_argument("--only", type=lambda text: text.split(","), help="some of them, by name")
    parser.add_argument("--set", nargs="*", default=[], help="overrides of all variants, e.g. train.distil.seed=1")
    parser.add_argument("--every", type=int, default=8, help="steps between two points")
    parser.add_argument("--length", type=int, default=512, help="tokens of a block that perplexity is taken of")
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--name", default="learning-curves", help="of the output (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=HERE.parent / "eval" / "results")
    return parser.parse_args()


def measure(given: argparse.Namespace) -> str:
    """Run what is not finished; returns the table."""
    torch.set_num_threads(given.threads)
    wanted = variants(given.variants, given.set, given.only)
    first = next(iter(wanted.values()))
    target = given.out / f"{given.name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    measured = {"source": first.source.id, "every": given.every, "length": given.length, "blocks": given.blocks}
    results: dict[str, Any] = {"schema": 1, "recipe": first.name, "measured": measured, "lines": {}, "variants": {}}
    if target.is_file():
        before = json.loads(target.read_text())
        if before["measured"] != measured:
            raise InputError(
                f"{target}: holds curves that were measured otherwise ({before['measured']}, now {measured}); "
                "choose another --name, or remove it"
            )
        results |= {key: before[key] for key in ("lines", "variants")}
    results["environment"] = environment(torch.device("cpu"), first.train[0].seed, {})
    located = locate(first.source.id, first.source.revision, package=first.source.package)
    ids = perplexity.cut(validation_text(), load_tokenizer(located), given.length, given.blocks)
    controls = {name: control(located, each)[0] for name, each in wanted.items()}
    if not {"source", *controls.values()} <= results["lines"].keys():
        results["lines"] |= lines(located, list(wanted.values()), ids)
    for name, each in wanted.items():
        made = json.loads(json.dumps(recipes.to_dict(each)))
        if results["variants"].get(name, {}).get("recipe") == made:
            print(f"{name}: finished earlier, kept", file=sys.stderr)
            continue
        points = []
        for point in curve(each, located, ids, given.every):
            print(name, json.dumps(point), file=sys.stderr)
            points.append(point)
        results["variants"][name] = {"commit": commit(), "control": controls[name], "points": points, "recipe": made}
        target.write_text(json.dumps(results, indent=1) + "\n")
    table = markdown(results)
    target.with_suffix(".md").write_text(table)
    plot(results, target.with_suffix(".png"))
    return table


def main() -> None:
    try:
        print(measure(arguments()))
    except InputError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
