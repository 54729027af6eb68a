"""What tests of several files share about modeling."""

import torch

W, S, T = 16, 3, 60

# fp32 on CPU, for logits of size one; 3e-7 measured. Those of the tiny models reach ten.
LIMIT = 1e-5


def tokens(batch: int = 2, length: int = T) -> torch.Tensor:
    return torch.randint(3, 384, (batch, length))


def logits(model, x, **kwargs):
    with torch.no_grad():
        return model(x, **kwargs).logits


def in_pieces(model, x, cuts):
    past, out = None, []
    for start, end in zip([0, *cuts], [*cuts, x.shape[1]], strict=True):
        with torch.no_grad():
            result = model(x[:, start:end], past_key_values=past, use_cache=True)
        past = result.past_key_values
        out.append(result.logits)
    return torch.cat(out, 1), past


def difference(a, b):
    return float((a - b).abs().max())


def check_padded_rows(model, lengths, steps):
    """Rows of two lengths, the first the longer one, left-padded, in pieces and single tokens; each as if alone."""
    longest = lengths[0]
    rows = [tokens(1, n + steps)[0] for n in lengths]
    x = torch.stack([torch.cat([torch.full((longest - n,), 2), r]) for n, r in zip(lengths, rows, strict=True)])
    mask = torch.ones_like(x)
    mask[1, : longest - lengths[1]] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    past, out = None, []
    singles = ((i, i + 1) for i in range(longest + 5, longest + steps))
    for start, end in [(0, longest), (longest, longest + 5), *singles]:
        with torch.no_grad():
            result = model(
                x[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                past_key_values=past,
            )
        past = result.past_key_values
        out.append(result.logits)
    got = torch.cat(out, 1)
    for i, row in enumerate(rows):
        assert difference(got[i][mask[i].bool()], logits(model, row[None])[0]) < LIMIT * 10


def can_offload() -> bool:
    """Whether transformers can make the stream of an offloaded cache: not a CUDA build of PyTorch without a driver."""
    try:
        torch.Stream()
    except RuntimeError as error:
        return "CUDA" not in str(error) and "create a new Stream" not in str(error)
    return True
