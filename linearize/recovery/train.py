"""The training loop: one for every stage, on one process or many, resumable to the bit.

    accelerate launch -m linearize.train --recipe smollm2-135m --model runs/demo/0-converted --out runs/demo/1-distil

While it runs, everything is in ``OUT.training``; OUT appears, complete, at the end. The source that a student learns
from is the student itself with adapters off and softmax attention on: one set of frozen weights.
"""

import argparse
import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from transformers import AutoTokenizer

from linearize.checkpoint import adapters, companions, manifest
from linearize.checkpoint.atomic import check_output, check_space, output_folder
from linearize.checkpoint.manifest import MANIFEST, write_manifest
from linearize.checkpoint.open import is_adapter
from linearize.errors import InputError
from linearize.recipe import load as recipes
from linearize.recipe.schema import OPTIMIZERS, Recipe, Stage
from linearize.recovery.data import blocks
from linearize.recovery.loop import DIVIDED, Loop
from linearize.recovery.memory import Watch
from linearize.recovery.monitor import BOARD, LOG, Monitor
from linearize.recovery.resume import differences, interrupted, made_with


def train(
    model_dir: str | Path,
    recipe: Recipe | str | Path,
    stage: str | None,
    out: str | Path,
    resume: bool = False,
    overwrite: bool = False,
) -> Path:
    """Run one training stage of a recipe on a converted model.

    Args:
        model_dir: a folder that ``convert`` or an earlier stage has written.
        recipe: resolved, or a name or file.
        stage: name of the stage; None means the first.
        out: folder to appear at the end: adapters, or the whole model if the stage trains everything.
        resume: go on from the last checkpoint of an interrupted run, if there is one.
        overwrite: replace a model folder in the place of ``out``, and an interrupted run with other settings.

    Returns:
        ``out``.

    Raises:
        InputError: bad input, or the loss is not finite any more; the checkpoints stay beside ``out``.

    Example:
        >>> train("runs/demo/0-converted", "smollm2-135m", "distil", "runs/demo/1-distil")
    """
    folder, out = Path(model_dir), Path(out)
    wanted = recipe if isinstance(recipe, Recipe) else recipes.load(recipe)
    chosen = wanted.stage(stage)
    made = {"model": str(folder.resolve()), "stage": asdict(chosen), "data": recipes.to_dict(wanted)["data"]}
    if resume and not overwrite and (finished := made_with(out / MANIFEST)) and not differences(finished, made):
        return out
    check_output(out, overwrite)
    _check_stage(chosen, folder)
    accelerator = Accelerator(
        mixed_precision="no",  # accelerate's autocast returns fp32 logits, twice the memory; Loop has its own
        step_scheduler_with_optimizer=False,  # a step is a step, however many processes there are
        cpu=not torch.accelerator.is_available(),
        # Blocks that end inside the window give the memory no gradient.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    if deepspeed := accelerator.state.deepspeed_plugin:  # what it would otherwise read from a data loader
        deepspeed.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": chosen.micro_batch,
            "gradient_clipping": chosen.max_grad_norm,
        }
    working = DIVIDED.get(accelerator.distributed_type, OPTIMIZERS)
    if chosen.optimizer not in working:
        raise InputError(
            f"train.{chosen.name}.optimizer: found {chosen.optimizer}; with weights divided by "
            f"{accelerator.distributed_type.value} allowed: {', '.join(working)}"
        )
    if (chosen.transfer or chosen.keep != "last") and accelerator.distributed_type in DIVIDED:
        raise InputError(
            f"train.{chosen.name}: transfer makes its gradients layer by layer, and keep writes weights on the way; "
            "neither is possible where weights are divided among processes: run this stage without FSDP and DeepSpeed"
        )
    share = chosen.micro_batch * accelerator.num_processes
    if chosen.batch % share:
        raise InputError(
            f"train.{chosen.name}.batch: found {chosen.batch}; with {accelerator.num_processes} processes of "
            f"{chosen.micro_batch} sequences each (micro_batch) it must be a multiple of {share}"
        )
    work = out.with_name(f"{out.name}.training")
    checkpoint = interrupted(work, made, resume, overwrite)
    steps = chosen.tokens // (chosen.batch * chosen.seq_len)
    with accelerator.local_main_process_first():  # one process tokenises, the others find it done
        data = blocks(
            wanted.data, _tokenizer(folder), chosen.seq_len, steps * chosen.batch, chosen.seed, hold=chosen.watch > 0
        )
    loop = Loop(accelerator, chosen, folder, data, steps)
    check_space(work, loop.bytes())
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if checkpoint is None:
            shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(work / "checkpoints" / "unfinished", ignore_errors=True)
        (work / "checkpoints").mkdir(parents=True, exist_ok=True)
        (work / MANIFEST).write_text(json.dumps({"training": made}, indent=2))
    done = loop.load(checkpoint) if checkpoint else 0
    watch = Watch(loop.plain, loop.trained, data.held, chosen.keep, work)
    monitor = Monitor(work, steps, done, loop.about()) if accelerator.is_main_process else None
    try:
        for step in range(done + 1, steps + 1):
            record = loop.step(step, checkpoint)
            if chosen.watch and (step % chosen.watch == 0 or step == steps):
                with loop.autocast():
                    record |= watch.step(step, accelerator.is_main_process)
            if monitor:
                monitor.step(record)
            if step % chosen.save_every == 0 or step == steps:  # the last: writing the result may still fail
                checkpoint = loop.save(work, step)
    finally:
        if monitor:
            monitor.close()
    kept = watch.restore() if chosen.keep != "last" else steps
    weights = loop.weights()
    if accelerator.is_main_process:
        with output_folder(out, overwrite) as result:
            companions.carry(folder, result)
            adapters.save(loop.plain, weights, folder, result)
            (result / "recipe.yaml").write_text(recipes.to_yaml(wanted))
            shutil.copyfile(work / LOG, result / LOG)
            shutil.copytree(work / BOARD, result / BOARD)
            source = loop.plain.config.linearize["source"]
            facts = {"source": source, "training": made | {"step": kept}, "versions": manifest.versions()}
            write_manifest(result, facts, {})
        shutil.rmtree(work)
    accelerator.wait_for_everyone()
    return out


def _check_stage(stage: Stage, folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder; give one that `linearize convert` has written")
    if is_adapter(folder):
        if not adapters.keeps_source(stage.peft):
            raise InputError(f"{folder}: holds adapters, and train.{stage.name} trains weights; merge first")
    elif (stage.kl or stage.transfer) and (folder / LOG).is_file():
        raise InputError(
            f"{folder}: its weights have been trained, so they are no longer the source's, which kl and transfer of "
            f"train.{stage.name} learn from; start from the converted folder or from adapters on it, or set both to 0"
        )


def _tokenizer(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: no tokenizer can be read there: {str(error).strip().splitlines()[0]}") from error


def main(arguments: list[str] | None = None) -> None:
    """Run ``python -m linearize.train``, the form that launchers start."""
    parser = argparse.ArgumentParser(prog="linearize.recovery.train", description="Run one training stage of a recipe.")
    parser.add_argument(
        "--model", required=True, type=Path, help="folder written by linearize convert or an earlier stage"
    )
    parser.add_argument("--recipe", help="name or file (default: recipe.yaml in the model's folder)")
    parser.add_argument("--stage", help="stage of the recipe (default: the first)")
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT, or an interrupted run")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one value of the recipe"
    )
    given = parser.parse_args(arguments)
    try:
        wanted = recipes.load(given.recipe or given.model / "recipe.yaml", given.set)
        train(given.model, wanted, given.stage, given.out, given.resume, given.overwrite)
    except InputError as error:
        if int(os.environ.get("RANK", "0")) == 0:  # the others say the same
            print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"interrupted; --resume goes on from the last checkpoint in {given.out}.training", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
