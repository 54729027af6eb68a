"""What tests of several files share about scripts."""

from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from Linux's /proc"
)
