"""A linearized folder in another format: back to the source's own, or a graph for other runtimes."""

import importlib.util
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
from linearize.checkpoint.manifest import versions, write_manifest
from linearize.checkpoint.open import load, needed
from linearize.checkpoint.reading import read_json, reading
from linearize.errors import InputError, suggest

FORMATS = ("onnx", "pt2", "source")
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
REFUSED = {
    "openvino": "not carried by transformers' exporter yet; take onnx, which OpenVINO reads",
    "executorch": "ExecuTorch is not carried yet; take pt2",
}


def export(
    folder: str | Path, to: str, out: str | Path, overwrite: bool = False, link: bool = False,
    piece: int = 64, quantize: str | None = None, state_dtype: str | None = None,
) -> Path:  # fmt: skip
    """Write a linearized folder in another format.

    Args:
        folder: what `linearize convert` or `merge` wrote.
        to: ``source``: the architecture it was converted from, with softmax attention and the weights that the folder
            holds, byte for byte. ``onnx``: graphs that onnxruntime runs, without torch. ``pt2``: the same as programs
            of torch.export, for AOTInductor.
        out: folder to appear.
        overwrite: replace a model folder in its place.
        link: hard-link the weights instead of copying them (source).
        piece: tokens that a graph's prefill reads at a time (onnx, pt2).
        quantize: ``int8``, by onnxruntime's dynamic quantiser (onnx).
        state_dtype: ``float32``: keep the states of a graph in fp32, unrounded, in whatever dtype the model keeps them:
            larger, and a little nearer to the source (onnx, pt2).

    Returns:
        `out`.

    Raises:
        InputError: the folder is not linearized, or holds what the format does not have; or a package is missing.

    Example:
        >>> linearize.export("runs/demo/0-converted", "source", "runs/demo/as-source")
    """
    folder, out = Path(folder), Path(out)
    _check_options(to, link, piece, quantize, state_dtype)
    config = _config(folder)
    atomic.check_output(out, overwrite, needed(folder))
    tokenizer_files.check(folder)
    if to != "source":
        return _graphs(folder, to, out, overwrite, piece, quantize, state_dtype is not None)
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


def _check_options(to: str, link: bool, piece: int, quantize: str | None, state_dtype: str | None) -> None:
    if to not in FORMATS:
        raise InputError(f"--to {to}: {REFUSED.get(to) or 'unknown format. ' + suggest(to, FORMATS)}")
    if piece < 2:
        raise InputError(f"--piece: found {piece}; expected at least 2 tokens")
    if quantize not in (None, "int8") or quantize and to != "onnx":
        raise InputError(f"--quantize {quantize}: found with --to {to}; only int8 is known, with --to onnx")
    if state_dtype not in (None, "float32") or state_dtype and to == "source":
        raise InputError(f"--state-dtype {state_dtype}: found with --to {to}; only float32 is known, with onnx or pt2")
    if link and to != "source":
        raise InputError(f"--link: --to {to} writes weights of its own; leave it out")
    missing = [name for name in PACKAGES if to == "onnx" and importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"--to onnx: needs {', '.join(missing)}, not installed here: pip install 'linearize[onnx]'")


def _graphs(
    folder: Path, to: str, out: Path, overwrite: bool, piece: int, quantize: str | None, unrounded: bool
) -> Path:
    """Write a model as graphs; arguments as of `export`."""
    from linearize.conversion import graphs

    model, tokenizer = load(folder, "float32", "cpu")
    if unrounded:
        graphs.keep_unrounded(model)
    graphs.check(model, folder, to)
    with atomic.output_folder(out, overwrite) as work:
        graphs.write(model, tokenizer, to, work, piece, quantize)
        for licence in folder.glob("LICENSE*"):
            shutil.copyfile(licence, work / licence.name)
        write_manifest(work, {"source": model.config.linearize["source"], "versions": versions()}, {})
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
