"""What a model does beside its source: distribution, greedy text, its cache, and the health of its recurrent state.

- KL(source ‖ model) of the next token's distribution at every position of a few blocks of text.
- Agreement: greedy tokens until the first that differs from the source's continuation of the same beginning.
- Repetition of the continuations: rep-n = 1 − distinct / all n-grams of one continuation, mean over continuations
  (arXiv 1908.04319); distinct-n = distinct / all n-grams of all continuations together (arXiv 1510.03055).
- Cached = whole: on a few continuations, one forward over prompt and continuation, without cache and padding, is
  compared with what the cached steps of the left-padded batch computed.
- State: norm and effective rank (Roy & Vetterli, EUSIPCO 2007) of the memory's state while one long text is read. A
  norm that grows without end, or a rank that falls, beyond the training length is a state that collapses.
"""

import math
import statistics
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from typing import IO, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearize.errors import InputError
from linearize.evaluation import continuations, perplexity
from linearize.evaluation.continuations import Advance
from linearize.evaluation.suite import BehaviourSpec
from linearize.model.attention import linearized_modules

CHECKED = 4
"""Continuations whose logits are kept and compared with a whole forward."""
FIRST_STATE = 64
"""Tokens before the state is read for the first time; then at every doubling."""
LEAST = -6e4
"""Smallest logit, relative to the largest, that is told apart: half precision reaches that far."""
DAMAGED = "the model's weights are damaged or its dtype is too narrow: evaluate in float32 (--dtype float32)"


@dataclass(frozen=True)
class Continuations:
    """Greedy continuations of all prompts.

    Attributes:
        tokens: int64 [prompts, tokens].
        cached: the `cached` entry of results.json.
    """

    tokens: Tensor
    cached: dict[str, Any]


def check(spec: BehaviourSpec, blocks: int | None, context: int | None) -> None:
    """Refuse what cannot be measured.

    Args:
        spec: how much of everything.
        blocks: how many the suite's first text has; None without a text.
        context: most tokens that the model can read; None where it does not say.

    Raises:
        InputError: too few blocks, or something does not fit the context.
    """
    if blocks is not None and blocks < spec.kl_blocks:
        raise InputError(
            f"behaviour: kl_blocks is {spec.kl_blocks}, but the suite's first text has {blocks} blocks; set kl_blocks "
            f"to at most {blocks}, or take more blocks of the text"
        )
    for what, key, tokens in (
        ("prompts and continuations", "tokens", continuations.LONGEST + spec.tokens),
        ("the state's text", "state", spec.state),
    ):
        if context is not None and tokens > context:
            raise InputError(
                f"behaviour: {what} of up to {tokens} tokens do not fit the model's context of {context}; lower "
                f"behaviour.{key}"
            )


class Behaviour:
    """What all columns of a run share: blocks, beginnings, a long text, and what the source makes of them.

    Columns run one after the other, and the source's weights may be gone when the others run. So `refer` runs the
    source first and keeps its continuations in memory and its logits in an unnamed temporary file,
    until `close` or the end of the process: blocks · (length − 1) · vocabulary · 2 bytes, 0.2 GB for 4 × 512 tokens
    of a vocabulary of 49,152. All logits are kept, not the largest few, because the tail is where a damaged model puts
    its probability; in half precision below their maximum, where the likeliest tokens, near 0, are the most exact. Of a
    KL of 0.2723 (SmolLM2-135M-Instruct against untrained gla, W = 24) this takes 5e-6, float32 3e-6, unshifted half
    precision 1.7e-4, the 1024 largest alone 3.6e-3. On other models the source's own KL shows it (there 8e-8).

    Args:
        spec: how much of everything.
        blocks: int64 [blocks, length], text on which distributions are compared.
        text: where beginnings and the long text are taken from.
        tokenizer: of all columns.
        window: W of the buckets; None as in `perplexity.edges`.
        batch_size: rows per forward pass.
        seed: of the choice of beginnings.

    Raises:
        InputError: the text is too short.
    """

    def __init__(
        self,
        spec: BehaviourSpec,
        blocks: Tensor,
        text: str,
        tokenizer: Any,
        *,
        window: int | None,
        batch_size: int,
        seed: int,
    ):
        self.spec, self.batch_size = spec, batch_size
        self.blocks = blocks[: spec.kl_blocks]
        self.borders = perplexity.edges(blocks.shape[1], window)
        self.prompts = continuations.beginnings(text, tokenizer, spec.prompts, seed)
        doublings = range((spec.state // FIRST_STATE).bit_length())
        self.positions = [FIRST_STATE * 2**i for i in doublings]
        self.document = document(text, tokenizer, self.positions[-1]) if self.positions else None
        self.pad = next((x for x in (tokenizer.pad_token_id, tokenizer.eos_token_id) if x is not None), 0)
        self._continuations: Continuations | None = None
        self._logits: IO[bytes] | None = None

    def steps(self, refers: bool = False, is_source: bool = False) -> int:
        """Tokens that `refer`, or `measure`, reads or writes at most: what `advance` counts up to.

        Args:
            refers: of `refer`.
            is_source: of `measure` with that argument.
        """
        total = self.blocks.numel()
        if refers or not is_source:
            total += (len(self.prompts) + len(self.prompts[:CHECKED])) * self.spec.tokens
        if not refers and self.positions:
            total += self.positions[-1]
        return total

    def close(self) -> None:
        """Let go of the source's logits."""
        if self._logits is not None:
            self._logits.close()

    @torch.inference_mode()
    def refer(self, model: PreTrainedModel, advance: Advance = lambda count: None) -> None:
        """Keep what the source does. To be called before `measure`, with the source as it is.

        Args:
            model: the source.
            advance: called with the number of tokens that were read or written.

        Raises:
            InputError: there is no room for the file.
        """
        # An open file without a name rather than a mapped one: writing to a full disk is then an error, not a crash.
        self._logits = file = tempfile.TemporaryFile()  # noqa: SIM115 (open until the run ends)
        try:
            for block in self.blocks:
                for logits, _ in perplexity.predictions(model, block):
                    file.write(_below_maximum(logits).half().cpu().numpy().tobytes())
                advance(len(block))
            file.flush()
        except OSError as error:
            raise InputError(
                f"behaviour: the source's logits cannot be kept in {tempfile.gettempdir()} ({error}); set TMPDIR to a "
                "folder with more room, or lower behaviour.kl_blocks"
            ) from error
        self._continuations = self._continue(model, advance)

    def measure(self, model: PreTrainedModel, is_source: bool, advance: Advance = lambda count: None) -> dict[str, Any]:
        """The `behaviour` entry of a column of results.json.

        Args:
            model: of the column.
            is_source: take over the continuations that `refer` made with this very model.
            advance: called with the number of tokens that were read or written.

        Raises:
            InputError: a prediction or a state is not finite.
        """
        reference, logits = self._continuations, self._logits
        if reference is None or logits is None:
            raise RuntimeError("`refer` comes before `measure`")
        own = reference if is_source else self._continue(model, advance)
        lengths = continuations.agreement(own.tokens, reference.tokens)
        return {
            "kl": self._kl(model, logits, advance),
            "agreement": {
                "mean": statistics.fmean(lengths), "median": float(statistics.median(lengths)), "lengths": lengths,
            },
            "repetition": continuations.repetition(own.tokens.tolist()),
            "cached": own.cached,
            "state": self._state(model, advance),
        }  # fmt: skip

    # --- distribution

    @torch.inference_mode()
    def _kl(self, model: PreTrainedModel, file: IO[bytes], advance: Advance) -> dict[str, Any]:
        file.seek(0)
        rows = []
        for block in self.blocks:
            row = []
            for logits, _ in perplexity.predictions(model, block):
                kept = torch.frombuffer(bytearray(file.read(2 * logits.numel())), dtype=torch.float16)
                source = kept.view(logits.shape).to(logits.device).float()
                row.append(_kl_of(source, _below_maximum(logits)).cpu())
            rows.append(torch.cat(row))
            advance(len(block))
        nats = torch.stack(rows).double()
        if not nats.isfinite().all():
            position = int((~nats.isfinite()).any(0).nonzero()[0]) + 1
            raise InputError(f"behaviour: the model's prediction after {position} tokens is not a number; {DAMAGED}")
        means = nats.mean(1)
        return {
            "value": float(nats.mean()),
            "stderr": float(means.std() / math.sqrt(len(means))) if len(means) > 1 else None,
            "tokens": nats.numel(),
            "by_position": [
                {"start": start, "end": end, "kl": float(part.mean()), "tokens": part.numel()}
                for start, end in pairwise(self.borders)
                if (part := nats[:, start - 1 : end - 1]).numel()
            ],
        }

    # --- greedy text

    @torch.inference_mode()
    def _continue(self, model: PreTrainedModel, advance: Advance) -> Continuations:
        written, checks = [], []
        for prompts, checked in ((self.prompts[:CHECKED], True), (self.prompts[CHECKED:], False)):
            for i in range(0, len(prompts), self.batch_size):
                batch = prompts[i : i + self.batch_size]
                tokens, logits = continuations.greedy(model, batch, self.spec.tokens, self.pad, checked, advance)
                written.append(tokens)
                for row in range(len(batch) if checked else 0):
                    checks.append(continuations.cached_is_whole(model, batch[row], tokens[row], logits[row]))
                    advance(self.spec.tokens)
        if not all(math.isfinite(difference) for _, difference in checks):
            raise InputError(f"behaviour: a prediction in greedy text is not a number; {DAMAGED}")
        cached = {
            "checked": self.spec.tokens * len(checks),
            "equal": sum(equal for equal, _ in checks),
            "difference": max(difference for _, difference in checks),
        }
        return Continuations(torch.cat(written), cached)

    # --- state

    @torch.inference_mode()
    def _state(self, model: PreTrainedModel, advance: Advance) -> list[dict[str, Any]] | None:
        memories = [m for m in linearized_modules(model) if m.mixer.recurrent and m.branch in ("all", "memory")]
        if not memories or self.document is None:
            return None
        length = len(self.document)
        ends = sorted({*self.positions, *range(perplexity.PIECE, length, perplexity.PIECE)})
        entries, before = [], 0
        for end, (_, past) in zip(ends, perplexity.pieces(model, self.document, ends, cached=True), strict=True):
            advance(end - before)
            before = end
            if end in self.positions:
                states = [m.mixer.content(m.mixer.opened(past.layers[m.layer_idx].state))[0] for m in memories]
                if not all(x.isfinite().all() for x in states):
                    raise InputError(
                        f"behaviour: the memory's state is not finite after {end} tokens, so the model cannot read "
                        f"texts of this length; set behaviour.state below {end} to measure the rest"
                    )
                entries.append({"position": end, **health(states)})
        return entries


def document(text: str, tokenizer: Any, length: int) -> Tensor:
    """The first tokens of a text, repeated where it is too short.

    Args:
        text: the text.
        tokenizer: of the models.
        length: how many tokens.

    Returns:
        int64 [length].
    """
    ids = tokenizer(text[: continuations.CHARACTERS * length], add_special_tokens=False, verbose=False)["input_ids"]
    ids *= length // len(ids) + 1
    return torch.tensor([*perplexity.beginning(tokenizer), *ids][:length])


def _below_maximum(logits: Tensor) -> Tensor:
    """Logits relative to the largest of each row, in [LEAST, 0]."""
    return (logits - logits.amax(-1, keepdim=True)).clamp(min=LEAST)


def _kl_of(source: Tensor, model: Tensor) -> Tensor:
    """KL(source ‖ model) in nats, fp32 [...], from logits, fp32 [..., vocabulary] each."""
    p, q = source.log_softmax(-1), model.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def health(states: list[Tensor]) -> dict[str, float | None]:
    """Mean over layers and heads of norm and effective rank.

    Args:
        states: of each layer, matrices [G, K, V] or vectors [G, V], real or complex.

    Returns:
        norm: root of the sum of squares. effective_rank: None where all states are vectors.
    """
    # On the CPU and in double precision: singular values far below the largest one count too, and are cheap.
    states = [x.cpu().to(torch.promote_types(x.dtype, torch.float64)) for x in states]
    norms = torch.cat([torch.linalg.vector_norm(x.flatten(1), dim=1) for x in states])
    ranks = [effective_rank(x) for x in states if x.ndim == 3]
    return {"norm": float(norms.mean()), "effective_rank": float(torch.cat(ranks).mean()) if ranks else None}


def effective_rank(matrices: Tensor) -> Tensor:
    """exp of the entropy of the singular values over their sum (Roy & Vetterli 2007): [..., K, V] -> [...]; 0 for a
    matrix of zeros."""
    singular = torch.linalg.svdvals(matrices)
    total = singular.sum(-1, keepdim=True)
    shares = singular / total.clamp(min=torch.finfo(total.dtype).tiny)
    return torch.special.entr(shares).sum(-1).exp() * (total.squeeze(-1) > 0)
