"""Probe every architecture of the installed transformers and write down which can be linearized.

The list is linearize/model/architectures.json.
Each is tried as a tiny random model of its default configuration, for at most half a minute.

    python scripts/probe_archs.py [MODEL_TYPE ...]     # some: only print
"""

import json
import signal
import sys
import warnings

import transformers
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from linearize.conversion import probe
from linearize.errors import InputError
from linearize.model import architectures

SECONDS = 30


def verdict(kind: str) -> str:
    """Empty for an architecture that passes, else why not."""

    def config() -> PreTrainedConfig:
        made = CONFIG_MAPPING[kind]()
        if made.is_encoder_decoder:
            raise InputError(f"model type {kind!r}: is half of an encoder-decoder")
        return made

    signal.alarm(SECONDS)
    try:
        return probe.attempt(config)
    except Late:
        return f"{architectures.UNTRIED} that answers within {SECONDS} s"
    finally:
        signal.alarm(0)


class Late(BaseException):
    """Out of time; no handler of the probe takes it for a failure of the model."""


def _late(*_: object) -> None:
    raise Late


def main() -> None:
    """Probe, print, write."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    signal.signal(signal.SIGALRM, _late)
    passes, fails = [], {}
    for kind in sys.argv[1:] or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        why = verdict(kind)
        print(f"{kind}: {why or 'passes'}", flush=True)
        if why:
            fails[kind] = why
        else:
            passes.append(kind)
    if not sys.argv[1:]:
        content = {"transformers": transformers.__version__, "passes": passes, "fails": fails}
        architectures.RECORD.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
