"""What the site takes from outside docs/: reports and pictures of committed results, under results/."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

RESULTS = Path(__file__).parents[1] / "eval" / "results"


def on_files(files: Any, config: Any) -> Any:
    """Called by mkdocs with the files of the site; adds reports (*.html) and pictures (*.png)."""
    for path in sorted([*RESULTS.glob("*.html"), *RESULTS.glob("*.png")]):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files
