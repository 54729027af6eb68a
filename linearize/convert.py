"""Source model -> linearized folder. Tensors that do not change are copied as bytes and never become torch tensors.

The folder holds the source's weights under their own names, the mixers' new weights (if any) in one more shard, a
config.json with the `linearize` block, the source's tokenizer and small files, the resolved recipe, and a manifest.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers import __version__ as transformers_version
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from linearize import __version__, archs, bundle, files, weights
from linearize.errors import InputError
from linearize.files import format_bytes, verify
from linearize.inspection import cache_sizes, inspect
from linearize.mixers import build_config
from linearize.modeling import linearize_, linearized_modules
from linearize.recipe import to_yaml
from linearize.schema import Recipe
from linearize.sources import Located, check_tokenizer, fetch, materialise, read_config
from linearize.weights import Tensor

__all__ = ["Plan", "convert", "inspect", "plan", "verify"]

# Never carried over: weights in other formats, code that describes the source's class, and the source's own model card.
_LEFT_BEHIND = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".ot",
    ".index.json",
    ".py",
    ".md",
)
_SMALL = 128 << 20  # bytes; the largest tokenizers have a third of it
_STAGE = ".source"  # inside the unfinished folder: weights of a source that is no safetensors folder


@dataclass(frozen=True)
class Plan:
    """What a conversion will do, from the configuration alone.

    Attributes:
        source: id, model_type and where it was found.
        mixer: name and settings.
        layers: layers that get the mixer.
        kept: attention layers that stay softmax.
        parameters: of the source.
        new_parameters: that the mixers add.
        dtype: of the converted weights; ``auto`` means as stored.
        cache: bytes of cache of one row by context length, for the source and the converted model: see `cache_sizes`.
    """

    source: dict[str, Any]
    mixer: dict[str, Any]
    layers: list[int]
    kept: list[int]
    parameters: int
    new_parameters: int
    dtype: str
    cache: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe form."""
        return asdict(self)

    def text(self) -> str:
        """The plan for a terminal, one fact per line."""
        settings = ", ".join(f"{key} {value}" for key, value in self.mixer.items() if key != "name")
        at_32k = next(row for row in self.cache["contexts"] if row["context"] == 32768)
        share = at_32k["linearized"] / at_32k["source_kv"]
        growth = self.cache["bytes_per_token"]
        rows = {
            "source": f"{self.source['id']} ({self.source['model_type']}{', GGUF' if self.source['gguf'] else ''})",
            "mixer": f"{self.mixer['name']} ({settings})",
            "layers": f"{len(self.layers)} of {len(self.layers) + len(self.kept)} linearized"
            + (f"; softmax stays in {', '.join(map(str, self.kept))}" if self.kept else ""),
            "weights": f"{self.parameters / 1e6:,.1f} M, {self.new_parameters:,} new; dtype {self.dtype}",
            "cache per token": f"{growth['linearized']:,} bytes (source {growth['source_kv']:,})",
            "cache at 32K": f"{format_bytes(at_32k['linearized'])} (source {format_bytes(at_32k['source_kv'])}), "
            f"{share:.1%}",
        }
        return "\n".join(f"{name:<16} {value}" for name, value in rows.items())


def plan(located: Located, recipe: Recipe) -> Plan:
    """Work out what a conversion would do. Reads the source's configuration, never its weights.

    Args:
        located: the source, from `linearize.sources.locate`.
        recipe: its `convert` part names mixer, layers and dtype.

    Returns:
        The plan.

    Raises:
        InputError: unreadable configuration, unsupported architecture, wrong mixer settings, or a layer out of range.
    """
    return _plan(_build(located, recipe), located, recipe)


def _plan(model: PreTrainedModel, located: Located, recipe: Recipe) -> Plan:
    linearized = sorted(map(int, model.config.linearize["layers"]))
    new = _new_tensors(model)
    return Plan(
        source={"model_type": model.config.linearize["source"]["model_type"], **located.to_dict()},
        mixer=build_config(recipe.convert.mixer).to_dict(),
        layers=linearized,
        kept=[layer for layer in archs.attention_layers(model) if layer not in linearized],
        parameters=sum(parameter.numel() for name, parameter in model.named_parameters() if name not in new),
        new_parameters=sum(tensor.numel() for tensor in new.values()),
        dtype=recipe.convert.dtype,
        cache=cache_sizes(model.config),
    )


def _build_source(located: Located) -> PreTrainedModel:
    """The source without values (meta device): its names, shapes and configuration."""
    config = read_config(located)
    config._name_or_path = ""
    # Code that came with the source describes the source's class, not ours; a GGUF file's title is not needed.
    for attribute in ("auto_map", "_model_name_or_path"):
        config.__dict__.pop(attribute, None)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise InputError(
            f"{located.id}: transformers has no causal language model of type {config.model_type!r}; give a "
            "decoder-only text model"
        ) from error


def _build(located: Located, recipe: Recipe) -> PreTrainedModel:
    """The linearized model without values (meta device)."""
    model = _build_source(located)
    archs.check_supported(model.config.model_type)
    layers, paths = recipe.convert.layers, archs.attention_layers(model)
    if isinstance(layers, Mapping):
        kept = archs.check_layers(paths, layers["keep"], model.config)
        layers = [layer for layer in archs.full_layers(paths, model.config) if layer not in kept]
    chosen = {"full": None, "all": list(paths)}.get(layers, layers) if isinstance(layers, str) else layers
    return linearize_(model, recipe.convert.mixer, chosen, source=located.to_dict())


def _new_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Initial values of the weights that the mixers of a model on the meta device add, by their full names."""
    names = {id(module): name for name, module in model.named_modules()}
    new = {}
    for module in linearized_modules(model):
        mixer = type(module.mixer)(module.mixer.config, module.mixer.geometry)
        new |= {f"{names[id(module)]}.mixer.{name}": tensor for name, tensor in mixer.state_dict().items()}
    return new


def check_weights(located: Located, tensors: Mapping[str, Tensor]) -> None:
    """Check that a source's tensors are those that its configuration asks for: every name and shape. No values are
    read.

    Args:
        located: the source; its architecture is built without values for this.
        tensors: headers of its weights.

    Raises:
        InputError: names missing and unexpected tensors, and shapes that differ.
    """
    model = _build_source(located)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    # transformers renames, joins and splits tensors of some architectures as it loads them: so do we with the names.
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    ignored = {r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", *(model._keys_to_ignore_on_load_unexpected or ())}
    found, unexpected, mismatched = set(), [], []
    for tensor in tensors.values():
        name, pattern = rename_source_key(tensor.name, renamings, converters, model.base_model_prefix, expected)
        found.add(name)
        if name not in expected:
            if not any(re.search(pattern, tensor.name) for pattern in ignored):
                unexpected.append(tensor)
        elif pattern is None and tensor.shape != expected[name]:
            mismatched.append(f"{name} is {list(tensor.shape)}, the configuration makes it {list(expected[name])}")
    tied = model.all_tied_weights_keys
    present = found | {target for target, source in tied.items() if source in found}
    present |= {source for target, source in tied.items() if target in found}
    missing = [name for name in expected if name not in present]
    problems = [f"missing: {weights.names(missing)}"] if missing else []
    if unexpected:
        where = weights.names(f"{tensor.name} in {tensor.file.name}" for tensor in unexpected)
        problems.append(f"unexpected: {where}")
    if mismatched:
        problems.append(f"of another shape: {weights.names(mismatched)}")
    if problems:
        raise InputError(
            f"{located.path}: the weights do not fit config.json ({model.config.model_type}); {'; '.join(problems)}. "
            "Configuration and weights must come from the same model: download both again"
        )


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
        located: the source, from `linearize.sources.locate`.
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
    files.check_output(out, overwrite)
    if located.path.resolve().is_relative_to(out.resolve()):
        raise InputError(f"{out}: is the source, or holds it; choose another output folder")
    model = _build(located, recipe)
    check_tokenizer(located)
    located = fetch(located, allow_pickle)
    dtype = None if recipe.convert.dtype == "auto" else getattr(torch, recipe.convert.dtype)
    pickles = weights.pickles(located.path) if allow_pickle and not located.gguf else []
    staged = located.gguf is not None or bool(pickles) and not any(located.path.glob("*.safetensors"))
    tensors: dict[str, Tensor] = {}
    if not staged:
        tensors = weights.read_folder(located.path)
        check_weights(located, tensors)
    read = [located.path / located.gguf] if located.gguf else pickles if staged else _files(tensors)
    with files.output_folder(out, overwrite, _key(read, recipe, link), keep="model*.safetensors") as folder:
        done = sum(path.stat().st_size for path in folder.iterdir())
        files.check_space(out, _needed(model, tensors, dtype, link) - done)
        plain = located.path
        if staged:
            plain = folder / _STAGE
            materialise(located, plain, dtype)
            tensors = weights.read_folder(plain)
            check_weights(located, tensors)
        place = _move if staged else files.link if link else files.copy
        candidates = (dtype, model.config.dtype, weights.main_dtype(tensors))
        stored = next(each for each in candidates if isinstance(each, torch.dtype))
        hashes = _write_weights(model, tensors, folder, dtype, stored, place)
        model.config.dtype = stored
        if with_code:
            model.config.auto_map = bundle.AUTO_MAP
            (folder / bundle.FILE).write_text(bundle.code(bundle.mixers_of(model.config.to_dict())), encoding="utf-8")
        model.config.save_pretrained(folder)
        _carry(plain if located.gguf else located.path, folder, model)
        (folder / "recipe.yaml").write_text(to_yaml(recipe))
        if staged:
            shutil.rmtree(plain)
        facts = {
            "source": model.config.linearize["source"],
            "recipe_sha256": files.sha256(folder / "recipe.yaml"),
            "versions": {"linearize": __version__, "torch": torch.__version__, "transformers": transformers_version},
        }
        files.write_manifest(folder, facts, hashes)
    return out


def _files(tensors: Mapping[str, Tensor]) -> list[Path]:
    return list(dict.fromkeys(tensor.file for tensor in tensors.values()))


def _key(read: list[Path], recipe: Recipe, link: bool) -> str:
    """What decides names and bytes of the shards: those of a killed run are used again if all of it is the same."""
    stamps = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in read]
    return json.dumps([stamps, asdict(recipe.convert), link, __version__])


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
    total = sum(tensor.nbytes for tensor in _new_tensors(model).values())
    for file in _files(tensors):
        shard = [tensor for tensor in tensors.values() if tensor.file == file]
        cast = [_cast(model, tensor, dtype) for tensor in shard]
        if not link or cast != shard:
            total += sum(tensor.size for tensor in cast)
    return total


def _write_weights(
    model: PreTrainedModel,
    tensors: Mapping[str, Tensor],
    folder: Path,
    dtype: torch.dtype | None,
    stored: torch.dtype,
    place: Callable[..., str | None],
) -> dict[str, str | None]:
    """Write all shards and the index: tensors in `dtype` (None: as they are), the mixers' own in `stored`.

    Args:
        place: moves, links or copies an unchanged shard: (source, target, advance, look) -> its hash, if known.

    Returns:
        File name -> sha256, or None where it was not computed.
    """
    new, sources = _new_tensors(model), _files(tensors)
    count = len(sources) + bool(new)
    hashes: dict[str, str | None] = {}
    with files.progress("Writing weights", sum(tensor.size for tensor in tensors.values())) as advance:
        for number, file in enumerate(sources, 1):
            shard = [tensor for tensor in tensors.values() if tensor.file == file]
            cast = [_cast(model, tensor, dtype) for tensor in shard]
            target = folder / weights.shard_name(number, count)
            if target.exists():  # complete, from a run that was killed later
                hashes[target.name] = files.sha256(target, advance)
            elif cast == shard:
                hashes[target.name] = place(file, target, advance, weights.no_nan(shard))
            else:
                writers = [weights.cast_tensor(old, to, advance) for old, to in zip(shard, cast, strict=True)]
                weights.write_shard(target, zip(cast, writers, strict=True))
                hashes[target.name] = files.sha256(target)
    if new:
        target, own = folder / weights.shard_name(count, count), folder / ".own.safetensors"
        save_file({name: tensor.to(stored) for name, tensor in new.items()}, own, metadata={"format": "pt"})
        hashes[target.name] = _move(own, target, lambda count: None, weights.no_nan([]))
    if count > 1:
        weights.write_index(folder, {k: v for name in hashes for k, v in weights.read_header(folder / name).items()})
    return hashes


def _move(source: Path, target: Path, advance: Callable[[int], None], look: Callable[[int, memoryview], None]) -> str:
    source.replace(target)
    target.chmod(0o666 & target.parent.stat().st_mode)  # safetensors lets only the owner read
    return files.sha256(target, advance, look)


def _carry(source: Path, folder: Path, model: PreTrainedModel) -> None:
    """Copy the source's tokenizer, chat templates, generation settings, licence and other small files."""
    for path in source.iterdir():
        left_behind = path.name == "config.json" or path.name.startswith(".") or path.name.endswith(_LEFT_BEHIND)
        if path.is_file() and not left_behind and path.stat().st_size <= _SMALL:
            shutil.copyfile(path, folder / path.name)
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, folder / templates.name, dirs_exist_ok=True)
    if not (folder / "generation_config.json").exists():
        generation = GenerationConfig.from_model_config(model.config)
        generation._from_model_config = False  # else every load makes it anew and says so
        generation.save_pretrained(folder)
