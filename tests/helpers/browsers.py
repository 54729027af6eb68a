"""Pictures of a report as a desktop and a phone show it: PREFIX-desktop.png (1280 wide) and PREFIX-phone.png (390).

    python tests/helpers/browsers.py runs/demo/report.html --out report

Needs Chromium or Chrome. The page is shown in a frame of the width of the device, because a window of a browser cannot
be made as narrow as a phone; `open_page` is also what the tests look through.
"""

import argparse
import html
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDTHS = {"desktop": 1280, "phone": 390}
# Fills the element `measured` with the JSON of what PROBE, an expression over the framed document, gives.
FRAME = """<!DOCTYPE html><meta charset="utf-8"><link rel="icon" href="data:,">
<style>body {{ margin: 0 }} iframe {{ border: 0; display: block; width: {width}px; height: {height}px }}</style>
<iframe srcdoc="{page}"></iframe><pre id="measured" hidden></pre>
<script>onload = () => {{
  const page = document.querySelector("iframe").contentDocument;
  document.getElementById("measured").textContent = JSON.stringify({probe});
}}</script>"""


def browser() -> str | None:
    """Path of a browser that has a headless mode; None if there is none."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def open_page(
    page: str, width: int, *flags: str, height: int = 800, probe: str = "page.documentElement.scrollHeight"
) -> subprocess.CompletedProcess[str]:
    """Show a page, HTML, in a frame of width × height pixels, with more flags of the browser.

    `probe` is JavaScript over `page`, the framed document, whose value lands in `<pre id="measured">`.
    """
    program = browser()
    assert program is not None
    with tempfile.TemporaryDirectory() as folder:
        frame = Path(folder) / "frame.html"
        content = FRAME.format(width=width, height=height, page=html.escape(page), probe=probe)
        frame.write_text(content, encoding="utf-8")
        command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        command += [f"--user-data-dir={folder}/profile", f"--window-size={width},{height}"]
        # Nothing but the page: no updates, no lists of components, and no address has a name.
        command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=4000"]
        return subprocess.run([*command, *flags, frame.as_uri()], capture_output=True, text=True, timeout=120)


def measured(ended: subprocess.CompletedProcess[str]) -> str:
    """What `probe` gave, as JSON; the browser must have been opened with ``--dump-dom``."""
    element = re.search(r'<pre id="measured"[^>]*>(.*?)</pre>', ended.stdout, flags=re.DOTALL)
    assert element is not None, ended.stderr
    return html.unescape(element[1])


def main() -> None:
    """Take both pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, metavar="FILE.html")
    parser.add_argument("--out", required=True, metavar="PREFIX")
    given = parser.parse_args()
    if browser() is None:
        sys.exit(f"none of {', '.join(BROWSERS)} is installed; on Debian: apt-get install chromium")
    page = given.page.read_text(encoding="utf-8")
    for name, width in WIDTHS.items():
        height = int(measured(open_page(page, width, "--dump-dom")))
        target = Path(f"{given.out}-{name}.png").resolve()
        ended = open_page(page, width, f"--screenshot={target}", height=height)
        if not target.is_file():
            sys.exit(f"the browser made no picture:\n{ended.stderr}")
        print(target)


if __name__ == "__main__":
    main()
