"""The small files that travel with the weights from stage to stage: tokenizer, templates, settings, recipe, licence."""

import json
import shutil
from pathlib import Path

from linearize.checkpoint import links, remote_code
from linearize.checkpoint.manifest import MANIFEST
from linearize.checkpoint.reading import read_json

OWN = {"config.json", "adapter_config.json", MANIFEST, "results.json", "report.html"}
"""Files that each stage writes anew, or that do not describe what it has made."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".index.json")
LARGEST = 128 << 20  # bytes; the largest tokenizers have a third of it


def copy_companions(source: Path, folder: Path, leave: tuple[str, ...] = (), code: bool | None = None) -> None:
    """Copy tokenizer, chat templates, generation settings, licence, recipe and other small files; never weights.

    Code that others wrote comes along where it is asked for and the settings name it; else they name none. The
    package's own is written anew.

    Args:
        source: the folder that was read.
        folder: the folder that is written.
        leave: names that are not copied either.
        code: whether code is asked for; None: if `source` was asked for it.

    Raises:
        InputError: a file is a link that leads out of `source`, or settings are damaged.
    """
    links.check(source)
    code = remote_code.asked(source) if code is None else code
    foreign = remote_code.foreign(source) if code else []
    for path in source.iterdir():
        left = path.name in (*OWN, *leave) or path.name.startswith(".") or path.name.lower().endswith(WEIGHTS)
        left = left or path.name.startswith("README") or path.suffix == ".py" and path.name not in foreign
        if not path.is_file() or left or path.stat().st_size > LARGEST:
            continue
        shutil.copyfile(path, folder / path.name)
        if path.name in remote_code.SETTINGS and not code:
            values = read_json(path)
            if (kept := remote_code.without_foreign(values)) != values:
                (folder / path.name).write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    if code and remote_code.asked(source) and remote_code.FILE not in leave:
        (folder / remote_code.FILE).write_text(remote_code.code(), encoding="utf-8")
    templates = source / links.TEMPLATES
    if templates.is_dir():
        shutil.copytree(templates, folder / templates.name, dirs_exist_ok=True)
