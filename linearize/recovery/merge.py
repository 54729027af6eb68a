"""Fold trained adapters into the weights they belong to."""

import shutil
from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper

from linearize.checkpoint import remote_code, tokenizer_files
from linearize.checkpoint.adapters import put_on
from linearize.checkpoint.atomic import check_output, output_folder
from linearize.checkpoint.companions import copy_companions
from linearize.checkpoint.identity import HASHES
from linearize.checkpoint.manifest import MANIFEST, versions, write_manifest
from linearize.checkpoint.open import base_folder, bases, is_adapter, needed, open_model
from linearize.checkpoint.reading import read_json
from linearize.errors import InputError
from linearize.model.attention import linearized_modules
from linearize.progress import step_progress
from linearize.recovery.monitor import BOARD


def merge(folder: str | Path, out: str | Path, overwrite: bool = False) -> Path:
    """Fold trained adapters into the weights they belong to: a plain linearized folder.

    Sums are formed in fp32 and rounded once, to the dtype of the weights.

    Args:
        folder: adapters on a linearized model: of a training stage, downloaded, or of another trainer.
        out: folder to appear.
        overwrite: replace a model folder in its place.

    Returns:
        ``out``.

    Raises:
        InputError: ``folder`` holds no adapters, their model is gone, or ``out`` exists.

    Example:
        >>> linearize.merge("runs/demo/1-distil", "runs/demo/merged")
    """
    adapter, out = Path(folder), Path(out)
    if not is_adapter(adapter):
        raise InputError(
            f"{adapter}: there are no adapters here (no adapter_config.json); give the folder of a LoRA stage"
        )
    for each in (adapter, *bases(adapter)):
        if (each / "tokenizer_config.json").is_file():
            tokenizer_files.check(each)
    check_output(out, overwrite, needed(adapter))
    with output_folder(out, overwrite) as work:
        fold(put_on(open_model(adapter), adapter)).save_pretrained(work)
        base, made = base_folder(adapter, weights=False), {"merged": adapter.resolve().name}
        for written in (base, adapter):  # what the adapters do not bring along is the base's
            copy_companions(written, work, code=remote_code.asked(base))
            if (written / MANIFEST).is_file():
                facts = read_json(written / MANIFEST)
                made |= {key: facts[key] for key in ("source", HASHES, "training") if key in facts}
        if (adapter / BOARD).is_dir():
            shutil.copytree(adapter / BOARD, work / BOARD)
        write_manifest(work, {"source": None, **made, "versions": versions()}, {})
    return out


def fold(wrapped: Any) -> Any:
    """Fold adapters into the model under peft's wrapper, and return it without."""
    layers = [module for module in wrapped.modules() if isinstance(module, BaseTunerLayer)]
    with step_progress("merging", len(layers)) as advance:
        for module in layers:
            base: Any = module.get_base_layer()
            dtype = base.weight.dtype
            base.float()
            module.merge()
            base.to(dtype)
            advance()
    for module in linearized_modules(wrapped):
        if isinstance(module.mixer, ModulesToSaveWrapper):
            before = next(module.mixer.original_module.parameters())
            module.mixer = module.mixer.modules_to_save["default"].to(before.dtype)
    return wrapped.base_model.unload()
