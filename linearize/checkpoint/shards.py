"""Safetensors files: headers read and checked, shards cast a chunk at a time, and the index. Nothing here loads a
model, and no more than a chunk of a file is ever in memory.
"""

import hashlib
import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from linearize.checkpoint import links
from linearize.checkpoint.copying import CHUNK
from linearize.checkpoint.reading import AGAIN, read_json, reading
from linearize.errors import InputError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODES = {dtype: code for code, dtype in FLOATS.items()}


@dataclass(frozen=True)
class Tensor:
    """One entry of a safetensors header.

    Attributes:
        name: the tensor's name.
        file: the shard that holds it.
        dtype: the format's code, such as ``BF16``.
        shape: its shape.
        start: first byte, counted from the start of the file.
        size: number of bytes.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    def cast(self, dtype: torch.dtype) -> "Tensor":
        """The same tensor in another dtype, if it holds plain floating-point values; else unchanged."""
        if self.dtype not in FLOATS or self.dtype == CODES[dtype]:
            return self
        return replace(self, dtype=CODES[dtype], size=math.prod(self.shape) * dtype.itemsize)


def read_header(path: Path) -> dict[str, Tensor]:
    """Read the header of a safetensors file and check that the file holds what it promises. Values are not read.

    Args:
        path: the file.

    Returns:
        Name -> tensor, in the order of the bytes.

    Raises:
        InputError: the file is no safetensors file, is cut short, or its header contradicts itself.
    """
    with reading(path, "is not a whole safetensors file", AGAIN):
        with path.open("rb") as file:
            start = file.read(8)
        if start == b"version ":
            raise InputError(f"{path}: is a Git LFS pointer, not the weights; run `git lfs pull` in the folder")
        try:
            with safe_open(path, "np") as opened:
                slices = {name: opened.get_slice(name) for name in opened.offset_keys()}
                described = [(name, each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()]
        except SafetensorError as error:
            said = str(error).removeprefix("Error while deserializing header: ")
            if "not fully covered" in said:
                said = f"cut short, or longer than its tensors: {path.stat().st_size} bytes"
            raise ValueError(said) from error
    tensors, position = {}, 8 + struct.unpack("<Q", start)[0]
    for name, dtype, shape in described:
        bits = int(re.sub(r"^\D+(\d+).*", r"\1", dtype)) if dtype != "BOOL" else 8  # I8, BF16, F8_E4M3, F4, ...
        tensors[name] = Tensor(name, path, dtype, shape, position, math.prod(shape) * bits // 8)
        position += tensors[name].size
    return tensors


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Read the headers of all weights of a model folder and check them against its index.

    Args:
        folder: holds ``model.safetensors``, or ``model.safetensors.index.json`` and the shards that it names.

    Returns:
        Name -> tensor, shard by shard, in the order of the bytes.

    Raises:
        InputError: no weights; a shard missing or damaged; the index names what is not there.
    """
    if (folder / SINGLE).is_file():
        return read_header(links.own(folder, folder / SINGLE))
    index = folder / INDEX
    if not index.is_file():
        raise InputError(_no_weights(folder))
    where = _weight_map(index)
    shards = sorted(set(where.values()))
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"{folder}: {len(missing)} of the {len(shards)} shards that {INDEX} names are missing: {names(missing)}; "
            f"{AGAIN}"
        )
    tensors: dict[str, Tensor] = {}
    for name in shards:
        for tensor in read_header(links.own(folder, folder / name)).values():
            if tensor.name in tensors:
                raise InputError(
                    f"{folder / name}: tensor {tensor.name} also stands in {tensors[tensor.name].file.name}"
                )
            tensors[tensor.name] = tensor
    for tensor, file in where.items():
        if tensor not in tensors:
            raise InputError(f"{index}: names tensor {tensor} in {file}, which does not hold it; {AGAIN}, both files")
        if tensors[tensor].file.name != file:
            raise InputError(f"{index}: names tensor {tensor} in {file}, but it stands in {tensors[tensor].file.name}")
    return tensors


def has_safetensors(folder: Path) -> bool:
    """Whether a folder's weights are safetensors; one that lies there by chance is not a model's."""
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()


def listed(folder: Path, single: str) -> set[str]:
    """Names of the files that hold a folder's weights, there or not: those that an index names, or the single file.

    Args:
        folder: holds the index, if there is one.
        single: `SINGLE` or `PICKLE`.

    Raises:
        InputError: the index is damaged.
    """
    index = folder / f"{single}.index.json"
    return {single} | (set(_weight_map(index).values()) if index.is_file() else set())


def pickles(folder: Path) -> list[Path]:
    """The PyTorch ``.bin`` shards of a folder, in the order of its index; empty if it has none."""
    if (folder / PICKLE).is_file():
        return [links.own(folder, folder / PICKLE)]
    files = [folder / name for name in sorted(listed(folder, PICKLE) - {PICKLE})]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise InputError(f"{folder}: {names(missing)} of the index {PICKLE}.index.json missing; {AGAIN}")
    return [links.own(folder, file) for file in files]


def _weight_map(index: Path) -> dict[str, str]:
    problem = "is not an index of shards, a JSON object with weight_map"
    with reading(index, problem, AGAIN):
        where = read_json(index, AGAIN, problem)["weight_map"]
        strange = [file for file in where.values() if Path(file).name != file or "\\" in file]
        if not where or strange:
            raise ValueError(f"{strange[0]!r} is not the name of a file beside it" if strange else "it is empty")
        return where


def adapters_alone(folder: Path) -> str | None:
    """What to say of a folder that holds adapters and no model; None of others."""
    settings = folder / "adapter_config.json"
    if not settings.is_file() or has_safetensors(folder):
        return None
    base = read_json(settings).get("base_model_name_or_path") or "the model that they were trained on"
    return (
        f"{folder}: holds adapters, not a model; give their base, {base}, or merge them into it first: those of "
        f"`linearize train` by `linearize merge {folder} --out MERGED`, others by peft: "
        f"AutoPeftModelForCausalLM.from_pretrained({str(folder)!r}).merge_and_unload().save_pretrained('MERGED')"
    )


def _no_weights(folder: Path) -> str:
    if (alone := adapters_alone(folder)) is not None:
        return alone
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    if pickles(folder) and not any(name.startswith("model") for name in others):
        return (
            f"{folder}: has pickled weights only (pytorch_model.bin), and a pickle can run code when it is read; pass "
            "--allow-pickle to read it with PyTorch's restricted loader, or give a folder with safetensors"
        )
    if others:
        return (
            f"{folder}: has no {SINGLE}, and no {INDEX} that lists {names(others)}; copy the index from the model's "
            "page"
        )
    return f"{folder}: has a configuration but no weights ({SINGLE} or {INDEX} with its shards); {AGAIN}"


def names(every: Iterable[str], most: int = 5) -> str:
    """The first few names of many, for a message."""
    every = list(every)
    return ", ".join(every[:most]) + (f" and {len(every) - most} more" if len(every) > most else "")


def write_shard(target: Path, tensors: Iterable[tuple[Tensor, Callable[[BinaryIO], None]]]) -> None:
    """Write a safetensors file tensor by tensor; it appears by rename when complete.

    Args:
        target: the new file.
        tensors: what to write, with a function that writes its bytes. `file` and `start` of the tensors are not used.
    """
    entries, position = {}, 0
    tensors = list(tensors)
    for tensor, _ in tensors:
        end = position + tensor.size
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # values start at a multiple of 8, as the reference implementation has it
    writing = target.with_name(f"{target.name}.writing")
    with writing.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for _, write in tensors:
            write(file)
    writing.replace(target)


def pieces(tensor: Tensor, chunks: int = 1) -> Iterator[torch.Tensor]:
    """The values of a tensor, read from its file a piece at a time.

    Args:
        tensor: what to read.
        chunks: size of a piece, in chunks.

    Yields:
        One-dimensional tensors of its dtype, or of bytes where that is no plain floating-point type; each shares its
        memory with the next.

    Raises:
        InputError: the file became shorter.
    """
    buffer, left = memoryview(bytearray(min(tensor.size, chunks * CHUNK))), tensor.size
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        while left:
            chunk = buffer[:left]
            if file.readinto(chunk) != len(chunk):
                raise InputError(f"{tensor.file}: became shorter while it was read; leave the source alone meanwhile")
            left -= len(chunk)
            yield torch.frombuffer(chunk, dtype=FLOATS.get(tensor.dtype, torch.uint8))


def cast_tensor(tensor: Tensor, target: Tensor, advance: Callable[[int], None]) -> Callable[[BinaryIO], None]:
    """A writer for `write_shard` that reads a tensor from its file and casts it, a chunk at a time.

    Args:
        tensor: what stands in the source's shard.
        target: the same tensor with the dtype to write.
        advance: called with the number of source bytes done, as it goes.

    Returns:
        The writer. It raises InputError for a value that is not finite, or does not fit the new dtype.
    """

    def write(file: BinaryIO) -> None:
        for values in pieces(tensor, chunks=8):  # PyTorch's threads are slow to start on less
            advance(values.nbytes)
            if tensor.dtype != target.dtype:
                original, values = values, values.to(FLOATS[target.dtype])
                if not torch.stack(torch.aminmax(values)).isfinite().all():  # NaN wins either way
                    raise InputError(_not_finite(tensor, original, target.dtype))
            file.write(values.view(torch.uint8).numpy().data)

    return write


def sha256_without_nan(path: Path, advance: Callable[[int], None]) -> str:
    """Hash a safetensors file and look at its values on the way; infinity is let through.

    Args:
        path: the file.
        advance: called with the number of bytes read, as it goes.

    Returns:
        64 hexadecimal digits.

    Raises:
        InputError: a value is not a number; names the tensor.
    """
    tensors = read_header(path)
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(path.stat().st_size - sum(tensor.size for tensor in tensors.values())))
    for tensor in tensors.values():  # they follow the header without gaps, in this order
        for values in pieces(tensor):
            if tensor.dtype in FLOATS and _has_nan(values):
                raise InputError(_not_finite(tensor, values, tensor.dtype))
            digest.update(values.view(torch.uint8).numpy().data)
            advance(values.nbytes)
    return digest.hexdigest()


def _has_nan(values: torch.Tensor) -> bool:
    """By bit patterns: of either sign, nothing but NaN lies above infinity.

    NumPy's loops and not PyTorch's, whose threads take the core that the copy needs.
    """
    bits = 8 * values.element_size()
    infinity = int(torch.tensor(math.inf, dtype=values.dtype).view(getattr(torch, f"int{bits}")))
    signed = values.view(getattr(torch, f"int{bits}")).numpy()
    return bool(signed.max() > infinity or signed.view(f"uint{bits}").max() > infinity + (1 << (bits - 1)))


def _not_finite(tensor: Tensor, values: torch.Tensor, dtype: str) -> str:
    where = f"{tensor.file}: tensor {tensor.name}"
    if not values.isfinite().all():
        return f"{where}: holds values that are not finite (NaN or infinity), so the model is damaged; {AGAIN}"
    return f"{where}: a value of {values.abs().max().item():.3g} does not fit {dtype}; choose bfloat16 or float32"


def shard_name(number: int, count: int) -> str:
    """The customary file name of a shard; numbers start at 1."""
    return SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def write_index(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the index of a sharded folder: which shard holds which tensor, and the size of all."""
    size = sum(tensor.size for tensor in tensors.values())
    index = {
        "metadata": {"total_size": size, "total_parameters": sum(math.prod(t.shape) for t in tensors.values())},
        "weight_map": {name: tensors[name].file.name for name in sorted(tensors)},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def main_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The floating-point dtype that most bytes of a set of tensors are in."""
    sizes = {code: sum(tensor.size for tensor in tensors.values() if tensor.dtype == code) for code in FLOATS}
    return FLOATS[max(sizes, key=lambda code: sizes[code])]


def describe(tensors: Mapping[str, Tensor]) -> dict[str, object]:
    """Sizes of a set of tensors: number of values, bytes, dtypes and files."""
    return {
        "parameters": sum(math.prod(tensor.shape) for tensor in tensors.values()),
        "bytes": sum(tensor.size for tensor in tensors.values()),
        "dtypes": sorted({tensor.dtype for tensor in tensors.values()}),
        "shards": sorted({tensor.file.name for tensor in tensors.values()}),
    }
