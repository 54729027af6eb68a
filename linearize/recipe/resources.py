"""Where the data that ship with the package lie."""

from pathlib import Path


def package_folder(name: str) -> Path:
    """Folder of data that ships with the package (``recipes``, ``eval``): inside it once installed, else beside it."""
    package = Path(__file__).resolve().parent.parent
    return package / name if (package / name).is_dir() else package.parent / name
