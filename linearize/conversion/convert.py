"""Source model -> linearized folder. Tensors that do not change are copied as bytes and never become torch tensors.

The folder holds the source's weights under their own names, the mixers' new weights (if any) in one more shard, a
config.json with the `linearize` block, the source's tokenizer and small files, the resolved recipe, and a manifest.
"""

import json
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig, PreTrainedModel

from linearize import progress
from linearize.checkpoint import atomic, copying, fit, manifest, remote_code, room, shards, text
from linearize.checkpoint.companions import copy_companions
from linearize.checkpoint.identity import HASHES
from linearize.checkpoint.shards import Tensor
from linearize.checkpoint.sources import Located, fetch, load_tokenizer, materialise
from linearize.conversion.plan import build, build_source, new_tensors
from linearize.model.sizes import text_sizes
from linearize.recipe.load import to_yaml
from linearize.recipe.schema import Recipe

_STAGE = ".source"  # inside the unfinished folder: weights of a source that is no safetensors folder


def convert(
    located: Located,
    recipe: Recipe,
    out: str | Path,
    overwrite: bool = False,
    *,
    link: bool = False,
    allow_pickle: bool = False,
    with_code: bool = False,
) -> Path:
    """Write the linearized folder of a source. It appears complete, by rename, or not at all.

    Weights are copied inside the kernel, shard by shard; with another dtype they are cast piece by piece; memory stays
    small either way. A GGUF file is dequantized in memory. A conversion that was killed continues where it stopped.

    Args:
        located: the source, from `linearize.checkpoint.sources.locate`.
        recipe: its `convert` part names mixer, layers and dtype.
        out: folder to appear.
        overwrite: replace a model folder in its place, once the new one is complete.
        link: hard-link unchanged shards instead of copying them: no time and no space, but writing into a shard in
            place then changes the source too. A hash is recorded only where it is known already.
        allow_pickle: read PyTorch ``.bin`` files where there are no safetensors, with the restricted loader.
        with_code: bring the code along, so that ``trust_remote_code=True`` opens it where this package is missing.

    Returns:
        `out`.

    Raises:
        InputError: anything wrong with the source, the recipe, the disk or `out`; nothing is left behind.
    """
    out = Path(out)
    atomic.check_output(out, overwrite, [located.read])
    model = build(located, recipe)
    _check_tokenizer(located, text_sizes(model.config).vocabulary)
    located = fetch(located, allow_pickle)
    dtype = None if recipe.convert.dtype == "auto" else getattr(torch, recipe.convert.dtype)
    pickles = shards.pickles(located.path) if allow_pickle and not located.gguf else []
    staged = located.gguf is not None or bool(pickles) and not shards.has_safetensors(located.path)
    tensors = {} if staged else _checked_tensors(located, located.path)
    read = [located.path / located.gguf] if located.gguf else pickles if staged else _files(tensors)
    with atomic.output_folder(out, overwrite, _key(read, recipe, link), keep="model*.safetensors") as folder:
        done = sum(path.stat().st_size for path in folder.iterdir())
        room.check_space(out, _needed(model, tensors, dtype, link) - done)
        plain = folder / _STAGE if staged else located.path
        if staged:
            materialise(located, plain, dtype)
            tensors = _checked_tensors(located, plain)
        transfer = _move if staged else copying.link if link else copying.copy
        candidates = (dtype, model.config.dtype, shards.main_dtype(tensors))
        stored = next(each for each in candidates if isinstance(each, torch.dtype))
        hashes, origin = _write_weights(model, tensors, folder, dtype, stored, transfer)
        model.config.dtype = stored
        _write_the_rest(model, plain if located.gguf else located.path, folder, recipe, with_code)
        if staged:
            shutil.rmtree(plain)
        origin = {path.name: copying.sha256(path) for path in read} if staged else origin
        manifest.write_manifest(folder, _facts(model, folder, {} if located.revision else origin), hashes)
    return out


def _check_tokenizer(located: Located, rows: int) -> None:
    """Open the tokenizer of a source with so many rows of embeddings: what cannot be opened would be noticed after
    hours of training."""
    vocabulary = load_tokenizer(located).get_vocab() if located.gguf is None else {}
    if beyond := text.beyond(vocabulary, rows):
        warnings.warn(f"{located.path}: tokenizer: {text.beyond_said(beyond, rows)}", stacklevel=3)


def _checked_tensors(located: Located, folder: Path) -> dict[str, Tensor]:
    """The headers of a source's weights, which lie in `folder`, once they fit its configuration; without constants."""
    tensors = shards.read_folder(folder)
    constants = fit.check(located.path, build_source(located), tensors)
    if constants:
        left = shards.names(tensor.name for tensor in constants)
        warnings.warn(f"{located.path}: {len(constants)} stored constants are left out: {left}", stacklevel=2)
    return {name: tensor for name, tensor in tensors.items() if tensor not in constants}


def _files(tensors: Mapping[str, Tensor]) -> list[Path]:
    return list(dict.fromkeys(tensor.file for tensor in tensors.values()))


def _key(read: list[Path], recipe: Recipe, link: bool) -> str:
    """What decides names and bytes of the shards: those of a killed run are used again if all of it is the same."""
    # Content that was replaced under the same size and time has another inode, or was changed later.
    stats = {str(path): path.stat() for path in read}
    stamps = [(path, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for path, s in stats.items()]
    return json.dumps([stamps, asdict(recipe.convert), link, manifest.versions()["linearize"]])


def _cast(model: PreTrainedModel, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor as it is to be written: what the architecture wants in float32 keeps its dtype."""
    kept = (*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ()))
    if dtype is None or any(re.search(rf"(^|\.){name}(\.|$)", tensor.name) for name in kept):
        return tensor
    return tensor.cast(dtype)


def _needed(model: PreTrainedModel, tensors: Mapping[str, Tensor], dtype: torch.dtype | None, link: bool) -> int:
    """Bytes of disk that the weights will take."""
    if not tensors:
        return sum(tensor.numel() for tensor in model.state_dict().values()) * (dtype or torch.float32).itemsize
    total = sum(tensor.nbytes for tensor in new_tensors(model).values())
    for file in _files(tensors):
        shard = [tensor for tensor in tensors.values() if tensor.file == file]
        cast = [_cast(model, tensor, dtype) for tensor in shard]
        if not link or not _unchanged(file, cast):
            total += sum(tensor.size for tensor in cast)
    return total


def _unchanged(file: Path, tensors: list[Tensor]) -> bool:
    """Whether tensors are all that a shard holds, as they are in it."""
    return list(shards.read_header(file).values()) == tensors


def _write_weights(
    model: PreTrainedModel,
    tensors: Mapping[str, Tensor],
    folder: Path,
    dtype: torch.dtype | None,
    stored: torch.dtype,
    transfer: Callable[..., str | None],
) -> tuple[dict[str, str | None], dict[str, str | None]]:
    """Write all shards and the index.

    Args:
        model: the linearized model without values.
        tensors: headers of the source's weights.
        folder: to write into.
        dtype: of the source's tensors; None: as they are.
        stored: of the mixers' own tensors.
        transfer: moves, links or copies an unchanged shard: (source, target, advance, digest) -> its hash, if known.

    Returns:
        File name -> sha256, or None where it was not computed: of what is written, and of what was read.
    """
    new, sources = new_tensors(model), _files(tensors)
    count = len(sources) + bool(new)
    hashes: dict[str, str | None] = {}
    origin: dict[str, str | None] = {}
    with progress.byte_progress("Writing weights", sum(tensor.size for tensor in tensors.values())) as advance:
        for number, file in enumerate(sources, 1):
            shard = [tensor for tensor in tensors.values() if tensor.file == file]
            cast = [_cast(model, tensor, dtype) for tensor in shard]
            target, same = folder / shards.shard_name(number, count), _unchanged(file, cast)
            if target.exists():  # complete, from a run that was killed later
                hashes[target.name] = copying.sha256(target, advance)
            elif same:
                hashes[target.name] = transfer(file, target, advance, shards.sha256_without_nan)
            else:
                writers = [shards.cast_tensor(old, to, advance) for old, to in zip(shard, cast, strict=True)]
                shards.write_shard(target, zip(cast, writers, strict=True))
                hashes[target.name] = copying.sha256(target)
            origin[file.name] = hashes[target.name] if same else copying.known_sha256(file) or copying.sha256(file)
    if new:
        target, own = folder / shards.shard_name(count, count), folder / ".own.safetensors"
        save_file({name: tensor.to(stored) for name, tensor in new.items()}, own, metadata={"format": "pt"})
        hashes[target.name] = _move(own, target, lambda count: None, copying.sha256)
    if count > 1:
        shards.write_index(folder, {k: v for name in hashes for k, v in shards.read_header(folder / name).items()})
    return hashes, origin


def _move(source: Path, target: Path, advance: Callable[[int], None], digest: Callable[..., str]) -> str:
    """Move a file that was just written; the arguments are those of `copying.copy`."""
    value = digest(source, advance)
    source.chmod(0o666 & target.parent.stat().st_mode)  # safetensors lets only the owner read
    source.replace(target)
    return value


def _write_the_rest(model: PreTrainedModel, source: Path, folder: Path, recipe: Recipe, with_code: bool) -> None:
    """Write what stands beside the weights: configuration, code, recipe, and the small files of the source."""
    if with_code:
        model.config.auto_map = remote_code.AUTO_MAP
        (folder / remote_code.FILE).write_text(remote_code.code(), encoding="utf-8")
    model.config.save_pretrained(folder)
    copy_companions(source, folder, code=with_code)
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    if not (folder / "generation_config.json").exists():
        generation = GenerationConfig.from_model_config(model.config)
        generation._from_model_config = False  # else every load makes it anew and says so
        generation.save_pretrained(folder)


def _facts(model: PreTrainedModel, folder: Path, origin: Mapping[str, str | None]) -> dict[str, Any]:
    """What the manifest tells of a conversion."""
    return {
        "source": model.config.linearize["source"],
        HASHES: {name: value for name, value in origin.items() if value is not None},
        "recipe_sha256": copying.sha256(folder / "recipe.yaml"),
        "versions": manifest.versions(),
    }
