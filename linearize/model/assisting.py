"""Assisted generation drafts no more tokens at a time than a linearized cache can take back."""

from typing import Any

from torch import Tensor

from . import cache


class BoundedDrafts:
    """A candidate generator of transformers whose drafts end where a cache could not take more of them back.

    Drafts beyond that are left out before the model reads them, so the text is the same, whoever drafts and however
    many it would like to: prompt lookup, a smaller model, early exit.

    Args:
        generator: the candidate generator; everything else is asked of it.
    """

    def __init__(self, generator: Any):
        self.generator = generator

    def __getattr__(self, name: str) -> Any:
        return getattr(self.generator, name)

    def get_candidates(self, input_ids: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """The text with its drafts.

        Args:
            input_ids: int64 [1, T], the text so far.
            **kwargs: of the generator.

        Returns:
            int64 [1, T + drafts], and the drafts' logits [1, drafts, V] where the generator has them.
        """
        ids, logits = self.generator.get_candidates(input_ids, **kwargs)
        ids = ids[:, : input_ids.shape[1] + cache.ROLLBACK]
        return ids, None if logits is None else logits[:, : cache.ROLLBACK]
