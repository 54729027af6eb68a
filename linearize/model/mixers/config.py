"""What can be set for every mixer."""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class MixerConfig:
    """What every mixer has; a mixer's file adds its own numbers. JSON-safe, stored in the checkpoint.

    Attributes:
        positive: numbers that must be above 0.
        name: the mixer's file name.
        combine: memory | liger | none.
        window: W ≥ 1 tokens of exact attention, the query's own included.
        sinks: s ≥ 0 first tokens that stay exact.
        softmax_heads: key/value heads that stay softmax, with their query heads, ascending; see softmax_heads.py.
        calibrated: whether a memory that has a log weight also has a weight `gate` [H] that is added to it, one number
            per head, as `linearize calibrate` fits it. A memory without a log weight always has its gate.
    """

    positive: ClassVar[tuple[str, ...]] = ()

    name: str = ""
    combine: str = "memory"
    window: int = 64
    sinks: int = 4
    softmax_heads: tuple[int, ...] = ()
    calibrated: bool = False

    @classmethod
    def preset(cls, combine: str) -> dict[str, Any]:
        """Defaults that differ for one way of combining."""
        return {}

    def problems(self) -> list[str]:
        """What is wrong with the values, each as `key: found; expected`."""
        problems = []
        if self.window < 1:
            problems.append(f"window: found {self.window}; expected at least 1")
        if self.sinks < 0:
            problems.append(f"sinks: found {self.sinks}; expected at least 0")
        if list(self.softmax_heads) != sorted({g for g in self.softmax_heads if g >= 0}):
            problems.append(f"softmax_heads: found {list(self.softmax_heads)}; expected different indices, ascending")
        values = {key: getattr(self, key) for key in self.positive}
        return problems + [f"{key}: found {x}; expected above 0" for key, x in values.items() if not x > 0]

    def to_dict(self) -> dict[str, Any]:
        """Without the heads that stay softmax where there are none, as folders were before they were possible."""
        values = asdict(self)
        heads = list(values.pop("softmax_heads"))
        return {**values, "softmax_heads": heads} if heads else values
