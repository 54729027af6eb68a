"""What tests of several files share about evaluation."""

from pathlib import Path
from typing import Any

import torch

from linearize.checkpoint.sources import load_source, locate
from linearize.model.modeling import linearize_

W, S = 16, 2
MIXER = {"name": "gla", "combine": "memory", "window": W, "sinks": S}


def student_of(source: Path, folder: Path, **mixer: Any) -> Path:
    """A linearized folder whose weights differ from the source's, as training would make them."""
    located = locate(str(source))
    model, tokenizer = load_source(located)
    linearize_(model, {**MIXER, **mixer}, source=located.to_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
