"""The small files that travel with the weights from stage to stage: tokenizer, templates, settings, recipe."""

import shutil
from pathlib import Path

from linearize.checkpoint.manifest import MANIFEST

WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
OWN = {"config.json", "adapter_config.json", MANIFEST, "README.md", "results.json", "report.html"}
"""Files that each stage writes anew, or that do not describe what it has made."""


def carry(source: Path, folder: Path) -> None:
    """Copy tokenizer, generation settings, recipe and other small files from stage to stage; never weights."""
    for path in source.iterdir():
        if path.is_file() and path.name not in OWN and not path.name.endswith(WEIGHTS):
            shutil.copyfile(path, folder / path.name)
