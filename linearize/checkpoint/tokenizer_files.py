"""The files of a tokenizer, checked before they are copied, published or loaded."""

from pathlib import Path

from tokenizers import Tokenizer

from linearize.checkpoint import links
from linearize.checkpoint.reading import AGAIN, read_json, reading
from linearize.errors import InputError

# Each is one way in which transformers keeps a tokenizer.
WAYS = ("tokenizer.json", "tokenizer.model", "vocab.json + merges.txt", "vocab.txt", "spiece.model")
WAYS += ("sentencepiece.bpe.model", "tekken.json")
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json")


def check(folder: Path) -> dict[str, int]:
    """Check that a folder holds a tokenizer, that its files are whole, and that they are the folder's own.

    Returns:
        Its tokens and their ids, as far as tokenizer.json has them.

    Raises:
        InputError: no known tokenizer file is in the folder, or one is damaged or a link that leaves it.
    """
    if not any(all((folder / name).is_file() for name in way.split(" + ")) for way in WAYS):
        raise InputError(
            f"{folder}: has no tokenizer ({', '.join(WAYS)}: none is there); copy the tokenizer's files from the "
            "model's page into the folder"
        )
    links.check(folder)
    for name in SETTINGS:
        if (folder / name).is_file():
            read_json(folder / name, AGAIN)
    file = folder / "tokenizer.json"
    if file.is_file():
        with reading(file, "the tokenizer cannot be read", "copy its files from the model's page"):
            return Tokenizer.from_file(str(file)).get_vocab()
    return {}
