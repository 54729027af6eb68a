"""One training stage, on one process or many, resumable to the bit.

While it runs, everything is in ``OUT.training``; OUT appears, complete, at the end. The source that a student learns
from is the student itself with adapters off and softmax attention on: one set of frozen weights.
"""

import json
import shutil
from contextlib import closing, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor

from linearize.checkpoint import adapters, companions, manifest
from linearize.checkpoint.atomic import check_output, check_space, output_folder
from linearize.checkpoint.manifest import MANIFEST, write_manifest
from linearize.checkpoint.open import bases, is_adapter, open_tokenizer
from linearize.errors import InputError
from linearize.recipe import load as recipes
from linearize.recipe.schema import OPTIMIZERS, Recipe, Stage
from linearize.recovery.data import blocks
from linearize.recovery.loop import DIVIDED, Loop
from linearize.recovery.memory import Watch
from linearize.recovery.monitor import BOARD, LOG, Monitor
from linearize.recovery.resume import Checkpoints, differences, interrupted, made_with


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
    _check_folder(chosen, folder)
    check_output(out, overwrite, [folder, *bases(folder)])
    accelerator = _accelerator(chosen)
    _check_processes(chosen, accelerator)
    work = out.with_name(f"{out.name}.training")
    checkpoint = interrupted(work, made, resume, overwrite)
    steps = chosen.tokens // (chosen.batch * chosen.seq_len)
    tokenizer = open_tokenizer(folder)
    with accelerator.local_main_process_first():  # one process tokenises, the others find it done
        data = blocks(wanted.data, tokenizer, chosen.seq_len, steps * chosen.batch, chosen.seed, hold=chosen.watch > 0)
    loop = Loop(accelerator, chosen, folder, data, steps)
    checkpoints = Checkpoints(loop, work)
    check_space(work, checkpoints.bytes())
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _begin(work, made, anew=checkpoint is None)
    watch = Watch(loop.plain, loop.trained, data.held, chosen.keep, work) if data.held is not None else None
    _run(loop, checkpoints, watch, checkpoint)
    kept = watch.restore() if watch and chosen.keep != "last" else steps
    weights = loop.weights()
    if accelerator.is_main_process:
        with output_folder(out, overwrite) as result:
            _write(result, folder, wanted, loop, weights, work, made | {"step": kept})
        shutil.rmtree(work)
    accelerator.wait_for_everyone()
    return out


def _check_folder(stage: Stage, folder: Path) -> None:
    """Refuse a folder that the stage cannot train."""
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


def _accelerator(stage: Stage) -> Accelerator:
    """What spreads the stage over the processes that there are."""
    accelerator = Accelerator(
        mixed_precision="no",  # accelerate's autocast returns fp32 logits, twice the memory; Loop has its own
        step_scheduler_with_optimizer=False,  # a step is a step, however many processes there are
        cpu=not torch.accelerator.is_available(),
        # Blocks that end inside the window give the memory no gradient.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    if deepspeed := accelerator.state.deepspeed_plugin:  # what it would otherwise read from a data loader
        deepspeed.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": stage.micro_batch,
            "gradient_clipping": stage.max_grad_norm,
        }
    return accelerator


def _check_processes(stage: Stage, accelerator: Accelerator) -> None:
    """Refuse a stage that these processes cannot share."""
    working = DIVIDED.get(accelerator.distributed_type, OPTIMIZERS)
    if stage.optimizer not in working:
        raise InputError(
            f"train.{stage.name}.optimizer: found {stage.optimizer}; with weights divided by "
            f"{accelerator.distributed_type.value} allowed: {', '.join(working)}"
        )
    if (stage.transfer or stage.keep != "last") and accelerator.distributed_type in DIVIDED:
        raise InputError(
            f"train.{stage.name}: transfer makes its gradients layer by layer, and keep writes weights on the way; "
            "neither is possible where weights are divided among processes: run this stage without FSDP and DeepSpeed"
        )
    share = stage.micro_batch * accelerator.num_processes
    if stage.batch % share:
        raise InputError(
            f"train.{stage.name}.batch: found {stage.batch}; with {accelerator.num_processes} processes of "
            f"{stage.micro_batch} sequences each (micro_batch) it must be a multiple of {share}"
        )


def _begin(work: Path, made: dict[str, Any], anew: bool) -> None:
    """Make the folder of an unfinished run; `anew` without what an earlier one has left there."""
    if anew:
        shutil.rmtree(work, ignore_errors=True)
    shutil.rmtree(work / "checkpoints" / "unfinished", ignore_errors=True)
    (work / "checkpoints").mkdir(parents=True, exist_ok=True)
    (work / MANIFEST).write_text(json.dumps({"training": made}, indent=2))


def _run(loop: Loop, checkpoints: Checkpoints, watch: Watch | None, checkpoint: Path | None) -> None:
    """All steps from a checkpoint on, or from the first."""
    stage, steps, is_main = loop.stage, loop.steps, loop.accelerator.is_main_process
    done = checkpoints.load(checkpoint) if checkpoint else 0
    with closing(Monitor(checkpoints.work, steps, done, loop.about())) if is_main else nullcontext() as monitor:
        try:
            for step in range(done + 1, steps + 1):
                record = loop.step(step, checkpoint)
                if watch and (step % stage.watch == 0 or step == steps):
                    with loop.autocast():
                        record |= watch.step(step, is_main)
                if monitor:
                    monitor.step(record)
                if step % stage.save_every == 0 or step == steps:  # the last: writing the result may still fail
                    checkpoint = checkpoints.save(step)
        except KeyboardInterrupt:
            if monitor and checkpoint:
                monitor.bar.line(f"--resume goes on from the last checkpoint, {checkpoint}")
            raise


def _write(
    result: Path, folder: Path, wanted: Recipe, loop: Loop, weights: dict[str, Tensor], work: Path, made: dict[str, Any]
) -> None:
    """Write what a stage has made of `folder`: trained weights, small files around them, and the logs in `work`."""
    companions.copy_companions(folder, result)
    adapters.save(loop.plain, weights, folder, result)
    (result / "recipe.yaml").write_text(recipes.to_yaml(wanted))
    shutil.copyfile(work / LOG, result / LOG)
    shutil.copytree(work / BOARD, result / BOARD)
    facts = {"source": loop.plain.config.linearize["source"], "training": made, "versions": manifest.versions()}
    write_manifest(result, facts, {})
