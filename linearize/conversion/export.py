"""A linearized folder in another format: back to the source's own."""

import json
import shutil
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from linearize import progress
from linearize.checkpoint import atomic, copying, fit, remote_code, shards, tokenizer_files
from linearize.checkpoint.companions import copy_companions
from linearize.checkpoint.config import read
from linearize.checkpoint.describe import is_new
from linearize.checkpoint.open import needed
from linearize.checkpoint.reading import read_json, reading
from linearize.errors import InputError, suggest

FORMATS = ("source",)


def export(folder: str | Path, to: str, out: str | Path, overwrite: bool = False, link: bool = False) -> Path:
    """Write a linearized folder in another format.

    Args:
        folder: what `linearize convert` or `merge` wrote.
        to: ``source``: the architecture it was converted from, with softmax attention and the weights that the folder
            holds, byte for byte.
        out: folder to appear.
        overwrite: replace a model folder in its place.
        link: hard-link the weights instead of copying them.

    Returns:
        `out`.

    Raises:
        InputError: the folder is not linearized, or holds weights that the format does not have.

    Example:
        >>> linearize.export("runs/demo/0-converted", "source", "runs/demo/as-source")
    """
    folder, out = Path(folder), Path(out)
    if to not in FORMATS:
        raise InputError(f"--to {to}: unknown format. {suggest(to, FORMATS)}")
    config = _config(folder)
    atomic.check_output(out, overwrite, needed(folder))
    tokenizer_files.check(folder)
    tensors = shards.read_folder(folder)
    fit.check(folder, fit.empty(read(folder), folder), tensors)
    new = [name for name in tensors if is_new(name)]
    if new:
        raise InputError(
            f"{folder}: holds weights that its mixers added ({shards.names(new)}), which the source's format does not "
            "have; only a folder without new weights can be turned back"
        )
    with atomic.output_folder(out, overwrite) as target:
        with progress.byte_progress("Writing weights", sum(tensor.size for tensor in tensors.values())) as advance:
            for file in dict.fromkeys(tensor.file for tensor in tensors.values()):
                (copying.link if link else copying.copy)(file, target / file.name, advance)
        if (folder / shards.INDEX).is_file():
            shutil.copyfile(folder / shards.INDEX, target / shards.INDEX)
        copy_companions(folder, target, leave=("recipe.yaml", remote_code.FILE))
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return out


def _config(folder: Path) -> dict[str, Any]:
    """The source's configuration, out of a linearized one."""
    if (folder / "adapter_config.json").is_file():
        raise InputError(
            f"{folder}: holds adapters, not a model; merge them first: linearize merge {folder} --out MERGED"
        )
    file = folder / "config.json"
    advice = "give a folder that `linearize convert` wrote"
    if not file.is_file():
        raise InputError(f"{folder}: has no config.json; {advice}")
    with reading(file, "has no complete `linearize` block, so it is not a linearized model", advice):
        config = read_json(file)
        source = config.pop("linearize")["source"]["model_type"]
        architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[source]
    config.pop("auto_map", None)
    return {**remote_code.without_foreign(config), "model_type": source, "architectures": [architecture]}
