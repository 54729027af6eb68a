"""A linearized folder in another format: back to the source's own."""

import json
import shutil
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from linearize import progress
from linearize.checkpoint import atomic, copying, manifest, remote_code, shards
from linearize.checkpoint.describe import is_new
from linearize.errors import InputError, suggest

FORMATS = ("source", "fla")
# Made for the linearized model; the rest of a folder is the source's.
_LEFT_BEHIND = {
    "config.json",
    manifest.MANIFEST,
    "recipe.yaml",
    "results.json",
    "report.html",
    "README.md",
    remote_code.FILE,
}


def export(folder: str | Path, to: str, out: str | Path, overwrite: bool = False, link: bool = False) -> Path:
    """Write a linearized folder in another format.

    Args:
        folder: what `linearize convert` or `merge` wrote.
        to: ``source``: the architecture it was converted from, with softmax attention and the weights that the folder
            holds, byte for byte. ``fla`` always ends in an error that says why.
        out: folder to appear.
        overwrite: replace a model folder in its place.
        link: hard-link the weights instead of copying them.

    Returns:
        `out`.

    Raises:
        InputError: the folder is not linearized, or holds weights for which the format has no place.

    Example:
        >>> export("runs/demo/0-converted", "source", "runs/demo/source")
    """
    folder, out = Path(folder), Path(out)
    if to not in FORMATS:
        raise InputError(f"--to {to}: unknown format. {suggest(to, FORMATS)}")
    config = _config(folder)
    if to == "fla":
        raise InputError(_why_not_fla(folder, config))
    tensors = shards.read_folder(folder)
    new = [name for name in tensors if is_new(name)]
    if new:
        raise InputError(
            f"{folder}: holds weights that its mixers added ({shards.names(new)}), for which the source's format has "
            "no place; only a folder without new weights can be turned back"
        )
    with atomic.output_folder(out, overwrite) as target:
        hashes = {}
        with progress.byte_progress("Writing weights", sum(tensor.size for tensor in tensors.values())) as advance:
            for file in dict.fromkeys(tensor.file for tensor in tensors.values()):
                place = copying.link if link else copying.copy
                hashes[file.name] = place(file, target / file.name, advance)
        kept = [path for path in folder.iterdir() if path.is_file() and path.suffix != ".safetensors"]
        for path in kept:
            if path.name not in _LEFT_BEHIND and not path.name.startswith("."):
                shutil.copyfile(path, target / path.name)
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return out


def _config(folder: Path) -> dict[str, Any]:
    """The source's configuration, out of a linearized one."""
    if (folder / "adapter_config.json").is_file():
        raise InputError(
            f"{folder}: holds adapters, not a model; merge them first: linearize merge {folder} --out MERGED"
        )
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        source = config.pop("linearize")["source"]["model_type"]
    except FileNotFoundError as error:
        raise InputError(f"{folder}: has no config.json; give a folder that `linearize convert` wrote") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{file}: has no complete `linearize` block, so it is not a linearized model; give a folder that "
            "`linearize convert` wrote"
        ) from error
    config.pop("auto_map", None)
    return {**config, "model_type": source, "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[source]]}


def _why_not_fla(folder: Path, config: dict[str, Any]) -> str:
    return (
        f"{folder}: cannot be written as a GLAForCausalLM of flash-linear-attention with the same logits, whatever its "
        "mixer. Its layer normalises what the recurrence reads (an RMSNorm on every head that cannot be turned off), "
        "has a gate projection of its own in place of a gate from the keys, and has neither RoPE nor a window beside "
        f"the recurrence; and its blocks are not those of {config['model_type']}. To use the model where this package "
        "is not installed, convert it with --with-code; to get the source back, --to source"
    )
