"""Probe every architecture of the installed transformers and write down which can be linearized: linearize/archs.json.

Each is tried as a tiny random model of its default configuration, for at most half a minute.

    python scripts/probe_archs.py [MODEL_TYPE ...]     # some: only print
"""

import json
import signal
import sys
import warnings

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from linearize.conversion import probe
from linearize.errors import InputError
from linearize.model import architectures

SECONDS = 30


def verdict(kind: str) -> str:
    """Empty for an architecture that passes, else why not."""
    signal.alarm(SECONDS)
    try:
        config = CONFIG_MAPPING[kind]()
        if config.is_encoder_decoder:
            return "is half of an encoder-decoder"
        checks = probe.probe_tiny(config)
    except InputError as error:
        return str(error).partition(": ")[2]
    except Late:
        return f"{architectures.UNTRIED} that answers within {SECONDS} s"
    except Exception as error:
        return f"{architectures.UNTRIED} that runs ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
    finally:
        signal.alarm(0)
    return "; ".join(f"{check.name}: {check.found}" for check in checks if not check.ok)


class Late(BaseException):
    """Out of time; no handler of the probe takes it for a failure of the model."""


def _late(*_: object) -> None:
    raise Late


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    signal.signal(signal.SIGALRM, _late)
    kinds = sys.argv[1:] or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    found = {}
    for kind in kinds:
        found[kind] = verdict(kind)
        print(f"{kind}: {found[kind] or 'passes'}", flush=True)
    if not sys.argv[1:]:
        content = {
            "transformers": transformers.__version__,
            "passes": [kind for kind, why in found.items() if not why],
            "fails": {kind: why for kind, why in found.items() if why},
        }
        architectures.RECORD.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
