"""What the answers of a model's folder depend on, as hashes: to see that a file was replaced under its name."""

import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from linearize.checkpoint import copying, shards
from linearize.checkpoint.manifest import facts_of
from linearize.errors import InputError

_TOKENIZER = re.compile(
    r"(tokenizer|special_tokens_map|added_tokens|vocab|merges|tekken)[\w.-]*|tokenization\w*\.py|.*\.(model|spm|tiktoken)"
)
HASHES = "source_sha256"
"""In the manifest of a folder: the files that hold the weights of its source, as they were, and their hashes."""


def files(folder: str | Path) -> dict[str, list[Path]]:
    """The files of a local model that its answers depend on; none of a model on the Hub, whose commit says it all.

    Chat templates in files of their own are not among them, neither is what only describes.

    Args:
        folder: folder, or GGUF file.

    Returns:
        weights: as `copying.fingerprint` hashes them, with the configuration; other_weights: under names that it does
        not know; tokenizer.
    """
    folder = Path(folder).expanduser()
    kinds: dict[str, list[Path]] = {"weights": copying.weight_files(folder), "other_weights": [], "tokenizer": []}
    if folder.is_dir():
        others: list[Path] = []
        with suppress(InputError):  # whoever opens the folder says what is wrong with it
            if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
                others = [path for path in folder.iterdir() if path.suffix.lower() == ".gguf"]
            elif shards.has_safetensors(folder):
                others = [folder / name for name in shards.listed(folder, shards.SINGLE)]
            else:
                others = shards.pickles(folder)
        known = kinds["weights"]
        kinds["other_weights"] = sorted(path for path in others if path not in known and path.is_file())
        named = [path for path in folder.iterdir() if _TOKENIZER.fullmatch(path.name) and path.is_file()]
        kinds["tokenizer"] = sorted(path for path in named if path not in known and path not in others)
    return kinds


def identity(folder: str | Path, advance: Callable[[int], None] = copying._ignore) -> dict[str, str | None]:
    """One hash for each kind of `files`; None where there are none.

    Args:
        folder: folder, GGUF file or Hub id.
        advance: called with the number of bytes read since the last call.
    """
    return {kind: copying.digest_of(paths, advance) if paths else None for kind, paths in files(folder).items()}


def check_source(source: Path, students: list[Path]) -> None:
    """See that a source still holds the weights that students were converted from, as far as a manifest says.

    Args:
        source: local folder.
        students: folders; the first that says anything counts.

    Raises:
        InputError: another file stands in the place of one, or none.
    """
    recorded = next((facts[HASHES] for each in students if HASHES in (facts := facts_of(each))), {})
    for name, digest in recorded.items():
        path = source / name
        if not path.is_file() or copying.sha256(path) != digest:
            raise InputError(
                f"{path}: {students[0]} was converted from other weights than {'stand' if path.is_file() else 'are'} "
                "there now, so comparing the two would say nothing; put the file back, name the model that it was "
                "converted from by --source, or convert this one again"
            )
