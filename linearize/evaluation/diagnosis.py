"""What this machine and one model can do, and why not more: what an issue form asks for. Nothing is written."""

import contextlib
import os
import platform
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, entry_points, requires, version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from packaging.requirements import Requirement

from linearize.checkpoint import manifest, remote_code, shards
from linearize.checkpoint import text as agreed
from linearize.checkpoint.describe import cache_sizes, is_new, text_sizes
from linearize.checkpoint.open import bases, is_adapter, open_config, open_tokenizer
from linearize.checkpoint.reading import read_json, reason
from linearize.checkpoint.room import cache_folder
from linearize.checkpoint.sources import Located, locate, read_config
from linearize.errors import InputError
from linearize.formats import aligned, format_bytes, ranges, recording
from linearize.model import architectures
from linearize.model.ops import BACKENDS, fla_backend

PACKAGES = (
    *("torch", "transformers", "tokenizers", "safetensors", "huggingface-hub", "peft", "accelerate", "datasets"),
    *("lm-eval", "gguf", "numpy", "flash-linear-attention", "fla-core", "triton", "vllm"),
)
VARIABLES = (
    *("LINEARIZE_BACKEND", "LINEARIZE_AUTOLOAD", "LINEARIZE_DEBUG", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES"),
    *("OMP_NUM_THREADS", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_MIXED_PRECISION"),
)
OK, WARNING, BROKEN = "ok", "warning", "broken"
"""For a chat template, which somebody else wrote: one with nested loops takes for ever."""
Row = dict[str, str]


def doctor(folder: str | Path | None = None) -> dict[str, Any]:
    """Tell what this machine can do, and what a model is fit for.

    Args:
        folder: a model folder, adapter folder, GGUF file or Hub id (its small files are downloaded); None: the machine
            alone.

    Returns:
        JSON-safe: linearize, versions (package -> version, None where it is missing), and the rows of `machine` and
        `model`, each with topic, state (ok, warning or broken) and text; ok: whether no row is broken.

    Raises:
        InputError: there is no such model, or its configuration cannot be read.

    Example:
        >>> linearize.doctor("runs/demo/merged")["ok"]
        True
    """
    versions = {name: _version(name) for name in PACKAGES}
    machine = [*_installed(versions), *_devices(), _kernels(), *_caches(), _autoload(), _variables()]
    model = [] if folder is None else _model(folder)
    return {
        "linearize": manifest.versions()["linearize"],
        "versions": {"python": platform.python_version(), **versions},
        "machine": machine,
        "model": model,
        "ok": not any(row["state"] == BROKEN for row in [*machine, *model]),
    }


def text(report: dict[str, Any]) -> str:
    """What `doctor` returned, for a terminal or an issue: versions, then a line per row."""
    versions = ", ".join(f"{name} {value}" for name, value in report["versions"].items() if value)
    marks = {OK: "", WARNING: "(!)", BROKEN: "(X)"}
    rows = [("", "linearize", report["linearize"]), ("", "versions", versions)]
    rows += [(marks[row["state"]], row["topic"], row["text"]) for part in ("machine", "model") for row in report[part]]
    return "\n".join(aligned(rows))


def _row(topic: str, text: str, state: str = OK) -> Row:
    return {"topic": topic, "state": state, "text": text}


def _version(name: str) -> str | None:
    try:
        return str(torch.__version__) if name == "torch" else version(name)
    except PackageNotFoundError:
        return None


def _installed(versions: dict[str, str | None]) -> Iterator[Row]:
    """Packages that are missing or of a version that was not tested."""
    try:
        needed = [Requirement(line) for line in requires("linearize") or ()]
    except PackageNotFoundError:  # a checkout on PYTHONPATH
        needed = []
    problems = []
    for each in needed:
        if each.marker is None:
            have = versions.get(each.name) or _version(each.name)
            if have is None or not each.specifier.contains(have, prereleases=True):
                problems.append(f"{each.name} {have or 'is missing'}, expected {each.specifier}")
    if problems:
        yield _row("packages", f"{'; '.join(problems)}; pip install --upgrade linearize", WARNING)
    else:
        yield _row("packages", "all that are needed are there" if needed else "run from a checkout, not installed")
    if versions["flash-linear-attention"] is None and versions["fla-core"] is None:
        yield _row("extra cuda", "not installed; on a machine with an NVIDIA GPU: pip install 'linearize[cuda]'")


def _devices() -> Iterator[Row]:
    memory = ""
    with contextlib.suppress(ValueError, OSError, AttributeError):  # not on every system
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        memory = f"; memory {format_bytes(total)}, {format_bytes(free)} free"
    yield _row("system", f"{platform.platform()}; {os.cpu_count()} cores, {torch.get_num_threads()} threads{memory}")
    try:
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_name(index)
            yield _row(f"cuda:{index}", f"{name}; memory {format_bytes(total)}, {format_bytes(free)} free")
        device = torch.accelerator.current_accelerator(check_available=True)
    except Exception as error:  # a driver that does not fit raises anything
        yield _row("device", f"the accelerator does not answer ({reason(error)}); everything runs on the CPU", WARNING)
    else:
        built = torch.version.cuda or getattr(torch.version, "hip", None)
        why = f"is built for {built}, and no device is there" if built else "is built without CUDA"
        yield _row("device", str(device) if device else f"cpu (torch {why})")


def _kernels() -> Row:
    """Which form of the recurrences runs, and why not the other."""
    wanted = os.environ.get("LINEARIZE_BACKEND") or None
    if wanted not in (None, *BACKENDS):
        allowed = " or ".join(BACKENDS)
        return _row("kernels", f"LINEARIZE_BACKEND is {wanted!r}; allowed: {allowed}, or unset it", WARNING)
    if wanted == "torch":
        return _row("kernels", "PyTorch, as LINEARIZE_BACKEND says")
    if not torch.cuda.is_available():
        state = WARNING if wanted == "fla" else OK
        return _row("kernels", "PyTorch; those of flash-linear-attention need a CUDA device, and there is none", state)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            missing = fla_backend.missing() or fla_backend.unsound(torch.device("cuda"))
    except Exception as error:  # what breaks while its kernels are imported is not ours to foresee
        missing = f"flash-linear-attention breaks when it is imported ({reason(error)})"
    if missing:
        return _row("kernels", f"PyTorch, several times slower than they need be: {missing}", WARNING)
    return _row("kernels", f"flash-linear-attention, for keys up to {min(fla_backend.WIDEST.values())} wide")


def _caches() -> Iterator[Row]:
    """The folders that everything is kept in between runs: whether they can be written, and how full they are."""
    for topic, folder, counted in (
        ("cache", cache_folder, True),
        ("hub cache", lambda: Path(constants.HF_HUB_CACHE), False),
    ):
        try:
            path = folder()
            there = next(each for each in (path, *path.parents) if each.exists())
            with tempfile.TemporaryFile(dir=there):  # that the mode allows it says little
                pass
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if counted else None
            held = "" if size is None else f"{format_bytes(size)} in it, "
            yield _row(topic, f"{_home(path)}; {held}{format_bytes(shutil.disk_usage(there).free)} free on its disk")
        except (OSError, RuntimeError) as error:  # RuntimeError: no home
            advice = "LINEARIZE_CACHE" if counted else "HF_HOME"
            yield _row(topic, f"cannot be written ({reason(error)}); set {advice} to a folder that can", WARNING)


def _home(path: Path) -> str:
    with contextlib.suppress(RuntimeError, ValueError):
        return f"~/{path.relative_to(Path.home())}"
    return str(path)


def _autoload() -> Row:
    if os.environ.get("LINEARIZE_AUTOLOAD") == "0":
        return _row("autoload", "off (LINEARIZE_AUTOLOAD=0): other programs must call linearize to open its folders")
    if any(point.value.startswith("linearize") for point in entry_points(group="torch.backends")):
        return _row("autoload", "programs that never import linearize open its folders too (lm-eval, pipelines)")
    return _row("autoload", "only programs that import linearize open its folders: it is run from a checkout")


def _variables() -> Row:
    those = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    return _row("environment", " ".join(those) or "none of the variables that matter is set")


# --- a model


def _model(folder: str | Path) -> list[Row]:
    """Rows about one model. What cannot be opened at all raises; a part that cannot is a row."""
    path = Path(folder).expanduser()
    if path.is_dir() and is_adapter(path):
        (base,) = bases(path)
        advice = f"merge folds them in: linearize merge {path.name}"
        about = _row("folder", f"{path.name}: adapters on {base.name}; {advice}")
        return [about, *_model(base)]
    located = Located(id=path.resolve().name, path=path) if path.is_dir() else locate(str(folder), recipes=False)
    config = open_config(path) if path.is_dir() else read_config(located, linearized=True)
    tensors: dict[str, shards.Tensor] | None = None
    rows = [_kind(located, config)]
    if located.gguf is None and path.is_dir():
        try:
            tensors = shards.read_folder(path)
            rows.append(_row("weights", _weights(tensors)))
        except InputError as error:
            rows.append(_row("weights", str(error), BROKEN))
    sizes = text_sizes(config)
    limit = "sets no limit" if sizes.context is None else f"{sizes.context:,} tokens"
    rows.append(_row("context", f"{sizes.layers} layers, width {sizes.hidden}, context {limit}"))
    if located.gguf is None:
        rows += _safely("tokenizer", _tokenizer, located.path, config, tensors)
    rows += _safely("opens in", _engines, located, config, tensors)
    rows += _safely("cache of a request", _request, config, sizes.context)
    return rows


def _safely(topic: str, look: Callable[..., Iterator[Row]], *arguments: Any) -> list[Row]:
    """The rows of one look at the model, or one that says why there are none: its files may hold anything."""
    try:
        return list(look(*arguments))
    except InputError as error:
        return [_row(topic, str(error), BROKEN)]
    except Exception as error:
        return [_row(topic, f"cannot be read ({type(error).__name__}: {reason(error)})", BROKEN)]


def _kind(located: Located, config: Any) -> Row:
    block = getattr(config, "linearize", None)
    if block is None:
        passes = config.model_type in architectures.record()["passes"]
        what = "can be converted" if passes else "not among those that are known to convert: linearize archs --probe"
        return _row("model", f"{located.id}: {config.model_type}, {what}", OK if passes else WARNING)
    layers = block["layers"]
    by_mixer = {name: [int(i) for i, each in layers.items() if each["name"] == name] for name in _mixers(layers)}
    words = "; ".join(f"{name} in layers {ranges(sorted(those))}" for name, those in by_mixer.items())
    source = block["source"].get("model_type")
    return _row("model", f"{located.id}: linearized {source}; {words or 'no layer replaced'}")


def _mixers(layers: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(each["name"] for each in layers.values()))


def _weights(tensors: dict[str, shards.Tensor]) -> str:
    held: dict[str, Any] = shards.describe(tensors)
    new = sum(is_new(name) for name in tensors)
    return (
        f"{held['parameters']:,} parameters in {len(held['shards'])} files, {format_bytes(held['bytes'])} "
        f"{' '.join(held['dtypes'])}; {new} tensors of the mixers' own"
    )


def _tokenizer(path: Path, config: Any, tensors: dict[str, shards.Tensor] | None) -> Iterator[Row]:
    """The tokenizer against the embedding, its template, and what ends an answer."""
    tokenizer: Any = open_tokenizer(path)
    rows = text_sizes(config).vocabulary
    named = r"embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight"
    held = [each.shape[0] for name, each in (tensors or {}).items() if name.endswith(named) and ".mixer." not in name]
    rows = min([rows, *held])
    beyond = agreed.beyond(tokenizer.get_vocab(), rows)
    if beyond:
        yield _row("tokenizer", agreed.beyond_said(beyond, rows), WARNING)
    else:
        yield _row("tokenizer", f"{len(tokenizer):,} tokens, {rows:,} rows of the embedding")
    yield _template(tokenizer)
    yield _ends(path, config, tokenizer)


def _template(tokenizer: Any) -> Row:
    if not tokenizer.chat_template:
        return _row("chat template", "none: prompts are continued as they are")
    refused = {}
    for roles in (["user"], ["system", "user"]):
        try:
            messages = [{"role": role, "content": "Hello"} for role in roles]
            agreed.render(tokenizer, messages, add_generation_prompt=True)
        except InputError as error:
            refused[roles[0]] = str(error)
    if "user" in refused:
        return _row("chat template", refused["user"].removeprefix("chat template: "), WARNING)
    return _row("chat template", "renders" + ", but takes no system message" * bool(refused))


def _ends(path: Path, config: Any, tokenizer: Any) -> Row:
    """End tokens as tokenizer, generation_config.json and config.json have them."""
    generation: Any = None
    if (path / "generation_config.json").is_file():
        try:
            generation = read_json(path / "generation_config.json").get("eos_token_id")
        except InputError as error:
            return _row("end tokens", str(error), WARNING)
    stated = {
        "tokenizer": tokenizer.eos_token_id,
        "generation_config": generation,
        "config": getattr(config.get_text_config(), "eos_token_id", None),
    }
    known = {name: value for name, value in stated.items() if value is not None}
    ids = {name: set(value if isinstance(value, list) else [value]) for name, value in known.items()}
    tokens = {
        name: ", ".join(_token(tokenizer, index) for index in sorted(each, key=str)) for name, each in ids.items()
    }
    words = ", ".join(f"{name} {each}" for name, each in tokens.items())
    if "tokenizer" not in ids:
        return _row("end tokens", f"the tokenizer has none, and training needs one; {words}".rstrip("; "), WARNING)
    apart = [name for name, each in ids.items() if not ids["tokenizer"] <= each]
    if apart:
        return _row("end tokens", f"{words}; {' and '.join(apart)} lacks the tokenizer's", WARNING)
    return _row("end tokens", words)


def _token(tokenizer: Any, index: Any) -> str:
    known = isinstance(index, int) and 0 <= index < len(tokenizer)
    return f"{index} {tokenizer.convert_ids_to_tokens(index)!r}" if known else f"{index!r} (no token)"


def _engines(located: Located, config: Any, tensors: dict[str, shards.Tensor] | None) -> Iterator[Row]:
    """What opens the model."""
    if located.gguf is not None:
        yield _row("opens in", "llama.cpp and its kin; here after linearize convert")
        return
    if not hasattr(config, "linearize"):
        yield _row("opens in", f"transformers, and every engine that knows {config.model_type}")
        return
    ways = ["transformers with linearize installed"]
    if getattr(config, "auto_map", None) and (located.path / remote_code.FILE).is_file():
        ways.append("transformers alone, by the code that it brings along")
    new = [name for name in tensors or {} if is_new(name)]
    if tensors is not None and not new:
        ways.append("vLLM, llama.cpp and others, with softmax attention, after linearize export --to source")
    yield _row("opens in", "; ".join(ways))
    if new:
        text = f"engines for {config.linearize['source'].get('model_type')}: {len(new)} tensors are the mixers' own"
        yield _row("not in", text)


def _request(config: Any, context: int | None) -> Iterator[Row]:
    """Bytes of cache that one request takes."""
    sizes = cache_sizes(config)
    rows = [row for row in sizes["contexts"] if context is None or row["context"] <= context]
    rows = rows or sizes["contexts"][:1]
    words = [
        f"{format_bytes(row['linearized'])} at {row['context'] // 1024}K"
        + (f" (source {format_bytes(row['source_kv'])})" if hasattr(config, "linearize") else "")
        for row in rows
    ]
    yield _row("cache of a request", f"{'; '.join(words)}; in 16 bits{recording(sizes)}")
