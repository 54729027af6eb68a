"""Text from a model: answers and chats, the source's own text drafted by the student, states that are kept."""

from linearize.generation.answers import generate
from linearize.generation.chats import Chat, chat
from linearize.generation.decoder import Generation
from linearize.generation.lossless import Lossless
from linearize.generation.store import StateStore

__all__ = ["Chat", "Generation", "Lossless", "StateStore", "chat", "generate"]
