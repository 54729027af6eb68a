"""What can be set for every mixer."""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class MixerConfig:
    """What every mixer has; a mixer's file adds its own numbers. JSON-safe, stored in the checkpoint.

    Attributes:
        positive: numbers that must be above 0.
        sized: the number that decides how large the state is, if one does, and its step; see checkpoint/budget.py.
        least: the smallest such number.
        dtypes: in which the state can be kept.
        older: what folders mean that were written before a setting existed.
        name: the mixer's file name.
        combine: memory | liger | none.
        window: W ≥ 1 tokens of exact attention, the query's own included.
        sinks: s ≥ 0 first tokens that stay exact.
        softmax_heads: key/value heads that stay softmax, with their query heads, ascending; see softmax_heads.py.
        state_dtype: float32 | bfloat16 | int8, for clusters also int4, in which the state is kept between two steps;
            see ops/compact.py.
        exact: N tokens behind the window that stay as they are: those that the recurrence reconstructs worst. 0: none;
            see exact.py.
        calibrated: whether a memory that has a log weight also has a weight `gate` [H] that is added to it, one number
            per head, as `linearize calibrate` fits it. A memory without a log weight always has its gate.
    """

    positive: ClassVar[tuple[str, ...]] = ()
    sized: ClassVar[tuple[str, int] | None] = None
    least: ClassVar[int] = 1
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16", "int8")
    older: ClassVar[dict[str, Any]] = {"state_dtype": "float32"}

    name: str = ""
    combine: str = "memory"
    window: int = 64
    sinks: int = 4
    softmax_heads: tuple[int, ...] = ()
    state_dtype: str = "float32"
    exact: int = 0
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
        if self.exact < 0:
            problems.append(f"exact: found {self.exact}; expected at least 0")
        if self.exact > 0 and self.combine != "memory":
            problems.append(
                f"exact: found {self.exact} with combine {self.combine}; tokens can only be kept behind a window whose "
                "softmax they share; use combine: memory, or leave exact out"
            )
        if self.state_dtype not in self.dtypes:
            problems.append(f"state_dtype: found {self.state_dtype!r}; expected {', '.join(self.dtypes)}")
        values = {key: getattr(self, key) for key in self.positive}
        return problems + [f"{key}: found {x}; expected above 0" for key, x in values.items() if not x > 0]

    def to_dict(self) -> dict[str, Any]:
        """Without heads that stay softmax, a dtype of the state and exact tokens where they are as in folders before
        they could be set."""
        values = asdict(self) | {"softmax_heads": list(self.softmax_heads)}
        before = {"softmax_heads": [], "state_dtype": "float32", "exact": 0}
        return {key: value for key, value in values.items() if key not in before or value != before[key]}
