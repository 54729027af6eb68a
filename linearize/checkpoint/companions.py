"""The small files that travel with the weights from stage to stage: tokenizer, templates, settings, recipe, licence."""

import shutil
from pathlib import Path

from linearize.checkpoint.manifest import MANIFEST

OWN = {"config.json", "adapter_config.json", MANIFEST, "README.md", "results.json", "report.html"}
"""Files that each stage writes anew, or that do not describe what it has made."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".index.json")
LARGEST = 128 << 20  # bytes; the largest tokenizers have a third of it


def copy_companions(source: Path, folder: Path, leave: tuple[str, ...] = ()) -> None:
    """Copy tokenizer, chat templates, generation settings, licence, recipe and other small files; never weights.

    Args:
        source: the folder that was read.
        folder: the folder that is written.
        leave: endings of names that are not copied either.
    """
    for path in source.iterdir():
        left = path.name in OWN or path.name.startswith(".") or path.name.endswith((*WEIGHTS, *leave))
        if path.is_file() and not left and path.stat().st_size <= LARGEST:
            shutil.copyfile(path, folder / path.name)
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, folder / templates.name, dirs_exist_ok=True)
