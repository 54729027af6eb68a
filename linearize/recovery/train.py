"""One training stage, on one process or many, resumable to the bit.

While it runs, everything is in ``OUT.training``; OUT appears, complete, at the end. The source that a student learns
from is the student itself with adapters off and softmax attention on: one set of frozen weights.
"""

import json
import os
import shutil
import sys
from contextlib import closing, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor

from linearize.checkpoint import adapters, companions, manifest, quantize
from linearize.checkpoint.atomic import (
    check_output,
    explained,
    held,
    output_folder,
    put_back,
    working_folder,
    write_text,
)
from linearize.checkpoint.identity import HASHES
from linearize.checkpoint.manifest import MANIFEST, write_manifest
from linearize.checkpoint.open import is_adapter, needed, open_config, open_tokenizer
from linearize.checkpoint.reading import launched, read_json
from linearize.checkpoint.room import check_memory, check_space
from linearize.errors import InputError
from linearize.model.sizes import text_sizes
from linearize.recipe import load as recipes
from linearize.recipe.schema import OPTIMIZERS, Recipe, Stage
from linearize.recovery.data import blocks
from linearize.recovery.documents import local_files
from linearize.recovery.loop import DIVIDED, Loop
from linearize.recovery.memory import Watch
from linearize.recovery.monitor import BOARD, LOG, Monitor
from linearize.recovery.resume import Checkpoints, content, differences, interrupted, made_with

DECIDED = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "no",  # it turns on TF32, too
    "ACCELERATE_GRADIENT_CLIPPING": "none",
    "ACCELERATE_DOWNCAST_BF16": "",
    "XLA_USE_BF16": "0",
    "XLA_DOWNCAST_BF16": "0",
}
"""Variables of launchers that would change what a recipe computes -> their value that does not."""
UNKNOWN = ("ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG")
"""Variables of launchers that ask for what this training cannot do."""


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
    chosen, work = wanted.stage(stage), working_folder(out)
    made = {"model": str(folder.resolve()), "stage": asdict(chosen), "data": recipes.to_dict(wanted)["data"]}
    made["content"] = content(folder, wanted)
    if resume and not overwrite and (finished := made_with(out / MANIFEST)) and not differences(finished, made):
        _forget(work, made)
        return out
    quantize.check(chosen.quantize, f"train.{chosen.name}.quantize")
    _check_folder(chosen, folder)
    check_output(out, overwrite, [*needed(folder), *local_files(wanted.data)])
    accelerator = _accelerator(chosen)
    _check_processes(chosen, accelerator)
    kept = f"what was there before is as it was: checkpoints are in {work}, and --resume goes on from the last one"
    with held(out) if accelerator.is_main_process else nullcontext(), explained(work, kept):
        checkpoint = interrupted(work, made, resume, overwrite)
        _train(accelerator, folder, wanted, chosen, out, made, checkpoint, overwrite)
    accelerator.wait_for_everyone()
    return out


def _train(
    accelerator: Accelerator, folder: Path, wanted: Recipe, chosen: Stage, out: Path, made: dict[str, Any],
    checkpoint: Path | None, overwrite: bool,
) -> None:  # fmt: skip
    """Train from a checkpoint on, or from the start, and let `out` appear."""
    work, steps = working_folder(out), chosen.tokens // (chosen.batch * chosen.seq_len)
    tokenizer = open_tokenizer(folder)
    _check_memory(chosen, folder, accelerator.device)
    with accelerator.local_main_process_first():  # one process tokenises, the others find it done
        count, rows = steps * chosen.batch, text_sizes(open_config(folder)).vocabulary
        data = blocks(wanted.data, tokenizer, chosen.seq_len, count, chosen.seed, chosen.watch > 0, rows)
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


def _forget(work: Path, made: dict[str, Any]) -> None:
    """Remove the unfinished form of a run that is finished, where a kill left it."""
    with suppress(InputError, OSError):
        if (before := made_with(work / MANIFEST)) and not differences(before, made):
            with held(work):
                shutil.rmtree(work)


def _check_memory(stage: Stage, folder: Path, device: torch.device) -> None:
    """Refuse blocks whose logits and their gradients, in two bytes each, fit no memory that the device has."""
    if stage.lm or stage.kl:
        vocabulary = open_config(folder).get_text_config().vocab_size
        needed = 4 * stage.micro_batch * stage.seq_len * vocabulary
        where = f"train.{stage.name}: logits of {stage.micro_batch} x {stage.seq_len:,} tokens (micro_batch x seq_len)"
        check_memory(needed, where, "use shorter blocks or a smaller micro_batch", device)


def _check_folder(stage: Stage, folder: Path) -> None:
    """Refuse a folder that the stage cannot train."""
    put_back(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder; give one that `linearize convert` has written")
    if is_adapter(folder):
        if not adapters.keeps_source(stage.peft):
            raise InputError(f"{folder}: holds adapters, and train.{stage.name} trains weights; merge first")
    elif (stage.kl or stage.transfer) and _is_trained(folder):
        raise InputError(
            f"{folder}: its weights have been trained, so they are no longer the source's, which kl and transfer of "
            f"train.{stage.name} learn from; start from the converted folder or from adapters on it, or set both to 0"
        )


def _is_trained(folder: Path) -> bool:
    """Whether the weights of a model are no longer its source's: by its manifest, or by a log where it has none."""
    facts = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else {}
    return (folder / LOG).is_file() or any(facts.get(key) for key in ("training", "merged"))


def _accelerator(stage: Stage) -> Accelerator:
    """What spreads the stage over the processes that there are.

    Raises:
        InputError: the environment asks for what cannot be.
    """
    _decide()
    with launched():
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
            "gradient_accumulation_steps": 1,  # it would divide the losses of micro batches, which Loop has weighted
        }
        for precision in ("bf16", "fp16", "fp8"):
            if str((deepspeed.deepspeed_config.get(precision) or {}).get("enabled", False)).lower() == "true":
                raise InputError(
                    f"train.{stage.name}: DeepSpeed's configuration enables {precision}, and weights that are trained "
                    "stay fp32 while the stage's dtype says how to compute; leave it out there"
                )
    return accelerator


def _decide() -> None:
    """Take out of the environment what a launcher set there and would change the mathematics of the recipe, and say so.

    Raises:
        InputError: it asks for a way to divide the work that this training does not know.
    """
    for name in UNKNOWN:
        if os.environ.get(name, "").lower() in ("1", "true", "yes", "on"):
            raise InputError(f"{name}: is set, and training knows DDP, FSDP and DeepSpeed only; unset it, or use one")
    for name, neutral in DECIDED.items():
        value = os.environ.get(name)
        if value is not None and value.lower() not in (neutral, "", "false", "0"):
            print(f"{name}={value} is left aside: the recipe decides that (batch, micro_batch, dtype)", file=sys.stderr)
        if value is not None:
            os.environ[name] = neutral


def _check_processes(stage: Stage, accelerator: Accelerator) -> None:
    """Refuse a stage that these processes cannot share."""
    working = DIVIDED.get(accelerator.distributed_type, OPTIMIZERS)
    if stage.quantize and accelerator.distributed_type in DIVIDED:
        raise InputError(
            f"train.{stage.name}.quantize: weights in 4 bits cannot be divided by "
            f"{accelerator.distributed_type.value}; run the stage without FSDP and DeepSpeed, or leave quantize out"
        )
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
    write_text(work / MANIFEST, json.dumps({"training": made}, indent=2))


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
    before = manifest.facts_of(folder)
    write_manifest(result, facts | {HASHES: before[HASHES]} if HASHES in before else facts, {})
