"""Fold trained adapters into the weights they belong to."""

import json
import shutil
from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper

from linearize.checkpoint.adapters import put_on
from linearize.checkpoint.atomic import output_folder
from linearize.checkpoint.companions import carry
from linearize.checkpoint.manifest import MANIFEST, versions, write_manifest
from linearize.checkpoint.open import is_adapter, open_model
from linearize.errors import InputError
from linearize.model.attention import linearized_modules


def merge(adapter: str | Path, out: str | Path, overwrite: bool = False) -> Path:
    """Fold trained adapters into the weights they belong to: a plain linearized folder.

    Sums are formed in fp32 and rounded once, to the dtype of the weights.

    Args:
        adapter: folder that a training stage with adapters has written.
        out: folder to appear.
        overwrite: replace a model folder in its place.

    Returns:
        ``out``.

    Raises:
        InputError: ``adapter`` holds no adapters, their model is gone, or ``out`` exists.

    Example:
        >>> merge("runs/demo/1-distil", "runs/demo/merged")
    """
    adapter, out = Path(adapter), Path(out)
    if not is_adapter(adapter):
        raise InputError(
            f"{adapter}: there are no adapters here (no adapter_config.json); give the folder of a LoRA stage"
        )
    with output_folder(out, overwrite) as folder:
        wrapped = put_on(open_model(adapter), adapter)
        for module in wrapped.modules():
            if isinstance(module, BaseTunerLayer):
                base: Any = module.get_base_layer()
                dtype = base.weight.dtype
                base.float()
                module.merge()
                base.to(dtype)
        for module in linearized_modules(wrapped):
            if isinstance(module.mixer, ModulesToSaveWrapper):
                before = next(module.mixer.original_module.parameters())
                module.mixer = module.mixer.modules_to_save["default"].to(before.dtype)
        plain: Any = wrapped.base_model.unload()  # type: ignore[operator]
        plain.save_pretrained(folder)
        carry(adapter, folder)
        shutil.copytree(adapter / "tb", folder / "tb")
        made = json.loads((adapter / MANIFEST).read_text())
        write_manifest(folder, {key: made[key] for key in ("source", "training")} | {"versions": versions()}, {})
    return out
