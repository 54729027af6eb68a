"""Fill what is generated in README.md and docs/: tables and pictures, from the code and the committed results.

    python scripts/make_docs.py            # writes; commit what changed
    python scripts/make_docs.py --check    # names what is out of date, and exits with 1

A part is generated where a page says `<!-- generated: NAME -->`, up to `<!-- end -->`; NAME is a function of
`docs_tables.py` or `docs_reference.py`. Pictures are whole files, of `docs_pictures.py`.
"""

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import docs_pictures
import docs_reference
import docs_tables

ROOT = Path(__file__).parents[1]
PARTS = docs_tables.PARTS | docs_reference.PARTS
REGION = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", flags=re.DOTALL)


def pages() -> list[Path]:
    """Every page that may hold generated parts."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def made() -> dict[Path, str]:
    """What every page and picture should hold now."""
    texts: dict[str, str] = {}

    def part(match: re.Match[str]) -> str:
        name = match[2]
        texts[name] = texts.get(name) or PARTS[name]()
        return f"{match[1]}\n{texts[name]}\n\n{match[3]}"

    wanted = {page: REGION.sub(part, page.read_text(encoding="utf-8")) for page in pages()}
    return wanted | {ROOT / "docs" / "img" / name: make() for name, make in docs_pictures.PICTURES.items()}


def stale() -> dict[Path, str]:
    """Files that differ from what they should hold, and what that is."""
    return {
        path: text for path, text in made().items() if not path.is_file() or path.read_text(encoding="utf-8") != text
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    changed = stale()
    for path, text in changed.items():
        print(f"{'out of date' if check else 'written'}: {path.relative_to(ROOT)}")
        if not check:
            path.write_text(text, encoding="utf-8")
    sys.exit(int(check and bool(changed)))
