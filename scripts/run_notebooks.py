"""Run the notebooks of examples/ from their first cell to their last, and keep what they print in them.

    python scripts/run_notebooks.py            # all of them; minutes on a CPU

The cells are plain Python, so that no kernel of Jupyter is needed to run or test them.
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(notebook: dict[str, Any], change: Any = lambda code: code) -> dict[str, Any]:
    """Run the code cells of a notebook in one namespace; each gets what it printed as its output.

    Args:
        notebook: content of an .ipynb file.
        change: code -> code that is run in its place.
    """
    variables: dict[str, Any] = {"__name__": "__notebook__"}
    for number, cell in enumerate((cell for cell in notebook["cells"] if cell["cell_type"] == "code"), 1):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(change("".join(cell["source"])), f"cell {number}", "exec"), variables)
        lines = printed.getvalue().splitlines(keepends=True)
        cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": lines}] if lines else []
        cell["execution_count"] = number
    return notebook


def main() -> None:
    """Run every notebook where its outputs do not disturb the repository."""
    os.chdir(sys.argv[1] if len(sys.argv) > 1 else ".")
    for path in sorted(EXAMPLES.glob("*.ipynb")):
        done = run(json.loads(path.read_text(encoding="utf-8")))
        path.write_text(json.dumps(done, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(path.name)


if __name__ == "__main__":
    main()
