"""What of a folder is published, and that it names things and never says where they lie.

A file goes up if it belongs to a model (`PUBLISHED`); paths of this machine in it become their last parts. JSON and
YAML are edited as what they are, key by key. Vocabularies and templates are never touched: a token may well look like a
path.
"""

import json
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from linearize.checkpoint import links
from linearize.checkpoint.manifest import MANIFEST
from linearize.checkpoint.reading import reading
from linearize.recipe.text import parse_yaml

PUBLISHED = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json", "generation_config.json"),
    *(MANIFEST, "recipe.yaml", "results.json", "train_log.jsonl", "README.md", "LICENSE*", "NOTICE*", "USE_POLICY*"),
    *("tokenizer*", "vocab*", "merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template*"),
    *("*.jinja", "*.model", "*.model.v*", "*.spm", "*.tiktoken", "tekken.json", "normalizer.json"),
    *("*processor_config.json", f"{links.TEMPLATES}/*.jinja"),
)
"""Patterns of what goes up, by its path in the folder. All else stays: checkpoints, logs, reports, others' code."""
PICTURES = ("*.png", "*.jpg", "*.jpeg", "*.svg", "*.gif", "*.webp")
STAYS = ("*checkpoint*", "tb", "runs", "*.tmp", "*.partial", "*.incomplete", "*.lock", ".*", "*.py", "*.bin")
STAYS += ("*.so", "*.dll", "*.dylib", "*.exe", "*.sh", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.npy", "*.npz")
"""Patterns of any part of a path that keep a file here even so; code goes up by `remote_code` alone."""

PATHS = {
    "config.json": ("_name_or_path", "linearize.source.path"),
    "adapter_config.json": ("base_model_name_or_path",),
    "tokenizer_config.json": ("name_or_path", "tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file",
                              "added_tokens_file", "cache_dir", "chat_template_file"),
    "generation_config.json": ("_name_or_path",),
    "recipe.yaml": ("source.id", "data.*.path", "eval.suite"),
    MANIFEST: ("source.path", "training.model", "training.data.*.path", "calibration.data.*.path",
               "selection.data.*.path"),
    "results.json": ("model", "source", "settings.source.id", "settings.source.path", "other.model"),
}  # fmt: skip
"""File -> keys whose values may be paths, also relative ones, with dots between levels and a star for lists."""
_VALUES = ("config.json", "adapter_config.json", "generation_config.json", "recipe.yaml", MANIFEST, "results.json",
           "tokenizer_config.json", "processor_config.json", "preprocessor_config.json",
           "model.safetensors.index.json", "adapter_model.safetensors.index.json")  # fmt: skip
"""Files in which all other texts are looked through too, but for tokens."""
_TEXTS = ("README.md", "train_log.jsonl")
_TOKENS = re.compile("token|template|stop_strings|prompt")
# A path within a text: from the root or a home, on a drive of Windows, on another machine.
_END = r"""[^\s"'`<>|,;:()\[\]{}*/\\]"""
_BEFORE = r"file://|https?://huggingface\.co/(?=/)"  # the latter is what transformers' Trainer makes of a folder
_INSIDE = re.compile(
    rf"(?<![\w./:~\\<-])(?:{_BEFORE})?(?:/{_END}+){{2,}}/?|(?<![\w./:~\\-])~[\w.-]*(?:[/\\]{_END}+)+"
    rf"|(?<!\w)[A-Za-z]:(?:[\\/]{_END}+)+|(?<![\w\\])\\(?:\\{_END}+){{2,}}"
)
_WHOLE = re.compile(r"(?:file://)?(?:~[\w.-]*)?[/\\].+|[A-Za-z]:[\\/].+|\.{1,2}[/\\].+")
_ROOTS = {"home", "Users", "root", "mnt", "media", "tmp", "var", "srv", "data", "scratch", "workspace", "work", "opt"}
_ROOTS |= {"private", "Volumes", "content", "kaggle", "project", "projects", "storage", "nfs", "lustre", "gpfs", "fsx"}


LOCAL = (".txt", ".jsonl", ".json", ".parquet", ".csv", ".gz", ".gguf")
"""Endings of what is a file here, however much its name looks like one of the Hub."""


def is_published(name: str) -> bool:
    """Whether a file goes up, by its path in the folder, with slashes between the parts."""
    # The star of fnmatch goes over slashes; only pictures may lie anywhere.
    wanted = any(fnmatch(name, each) and each.count("/") == name.count("/") for each in PUBLISHED)
    wanted = wanted or any(fnmatch(name, each) for each in PICTURES)
    return wanted and not any(fnmatch(part, each) for part in name.split("/") for each in STAYS)


def is_repo_id(name: str) -> bool:
    """Whether a name has the form ``organisation/name`` of the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def without_path(name: str) -> str:
    """The last part of a path of this machine; the id of something on the Hub, or a plain name, as it is."""
    if is_repo_id(name) and not Path(name).exists() and not name.lower().endswith(LOCAL):
        return name
    parts = [part for part in re.split(r"[/\\]", name) if part not in ("", ".", "..", "~")]
    return parts[-1] if parts else name


def named(file: str, content: bytes) -> bytes:
    """A file's content with names in the place of paths; the same bytes where there is none.

    Args:
        file: its name in the folder.
        content: what stands in it.

    Returns:
        The content to publish.

    Raises:
        InputError: it is not valid JSON or YAML.
    """
    if file in _TEXTS:
        before = content.decode("utf-8", errors="replace")
        return content if (after := _without_paths(before)) == before else after.encode()
    if file not in {*PATHS, *_VALUES}:
        return content
    is_yaml = file.endswith(".yaml")
    with reading(file, "cannot be read", "write the folder again"):
        before = parse_yaml(content, file, "write the folder again") if is_yaml else json.loads(content)
        after = values(file, before)
    if after == before:
        return content
    text = yaml.safe_dump(after, sort_keys=False, allow_unicode=True) if is_yaml else json.dumps(after, indent=2) + "\n"
    return text.encode()


def of_local_source(recipe: bytes) -> bytes:
    """A recipe whose source is a folder or file: its last part alone, also where it looks like an id of the Hub."""
    content = parse_yaml(recipe, "recipe.yaml", "write the folder again") if recipe else {}
    if not isinstance(content, dict) or "/" not in str((content.get("source") or {}).get("id", "")):
        return recipe
    content["source"] = {**content["source"], "id": content["source"]["id"].rstrip("/").rpartition("/")[2]}
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode()


def values(file: str, content: Any) -> Any:
    """What a JSON or YAML file of this name holds, with names in the place of paths."""
    for path in PATHS.get(file, ()):
        content = _shortened(content, path.split("."))
    return _every(content) if file in _VALUES else content


def _shortened(values: Any, keys: list[str]) -> Any:
    """The values, with a name in the place of each path that the keys lead to."""
    if not keys:
        return without_path(values) if isinstance(values, str) else values
    if keys[0] == "*" and isinstance(values, list):
        return [_shortened(each, keys[1:]) for each in values]
    if isinstance(values, dict) and keys[0] in values:
        return {**values, keys[0]: _shortened(values[keys[0]], keys[1:])}
    return values


def _every(values: Any) -> Any:
    """The values, with a name in the place of every path of a whole text or within one, but for tokens."""
    if isinstance(values, dict):
        return {_every(key): value if _TOKENS.search(str(key)) else _every(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_every(each) for each in values]
    if not isinstance(values, str):
        return values
    whole = _WHOLE.fullmatch(values) and (" " not in values or _is_local(values))
    return without_path(values) if whole else _without_paths(values)


def _without_paths(text: str) -> str:
    return _INSIDE.sub(lambda match: without_path(match[0]) if _is_local(match[0]) else match[0], text)


def _is_local(path: str) -> bool:
    """Whether what looks like a path is one of some machine: of a home or a usual root, or there on this one."""
    path = re.sub(f"^({_BEFORE})", "", path)
    parts = path.split("/")
    return not path.startswith("/") or parts[1] in _ROOTS or Path(*["/", *parts[1:3]]).exists()
