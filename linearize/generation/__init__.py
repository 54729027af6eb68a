"""Text from a model: answers and chats, the source's own text drafted by the student, states that are kept, and graphs
that run without torch (which is why nothing is imported here before it is asked for).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from linearize.generation.answers import generate as generate
    from linearize.generation.chats import Chat as Chat
    from linearize.generation.lossless import Lossless as Lossless
    from linearize.generation.result import Generation as Generation
    from linearize.generation.result import chat as chat
    from linearize.generation.store import StateStore as StateStore

_HOMES = {"Chat": "chats", "Generation": "result", "Lossless": "lossless", "StateStore": "store"}
_HOMES |= {"chat": "result", "generate": "answers"}

__all__ = ["Chat", "Generation", "Lossless", "StateStore", "chat", "generate"]  # pyright: ignore


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"linearize.generation.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
