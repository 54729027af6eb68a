"""Text from a model: answers and chats, the source's own text drafted by the student, states that are kept."""

from linearize.generation.answers import Chat, Generation, chat, generate
from linearize.generation.lossless import Lossless

__all__ = ["Chat", "Generation", "Lossless", "chat", "generate"]
