"""Pages of a server's cache: what mixers say of whole texts, they say of texts cut into the steps of a server."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.closeness import assert_close
from helpers.mixers import G, H, K, context, mixer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from linearize.model import host
from linearize.model.cache import LinearizedCacheLayer
from linearize.model.mixers import MIXERS
from linearize.serving.pages import Schedule, layout, page_bytes, run

LENGTHS, PAGES = (37, 5, 24), (3, 1, 4)
# New tokens of each text by step: decoding beside reading, a text that comes late, pieces of one token, a pause.
STEPS = ((20, 0, 9), (1, 3, 0), (15, 1, 13), (0, 1, 1), (1, 0, 1))
SEED = {"clusters": {"clusters": 16, "chunk": 4}}
CASES = [(name, combine) for name, cls in MIXERS.items() if not cls.keeps_source_cache for combine in cls.combines]
READS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select"}


class Blind(TorchDispatchMode):
    """Refuses a look at a number, which waits for a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in READS
        return func(*args, **(kwargs or {}))


def unrotate(positions: Tensor):
    """As if RoPE added a hundredth of the position to the first channel."""
    first = torch.eye(K)[0]
    return lambda x: x.float() - 0.01 * positions[:, None, :, None] * first


def texts() -> list[tuple[Tensor, ...]]:
    return [tuple(torch.randn(n, heads, K) for heads in (H, G, G)) for n in LENGTHS]


@torch.no_grad()
def whole(m, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    positions = torch.arange(len(q))[None]
    y = m(*(x.transpose(0, 1)[None] for x in (q, k, v)), context(unrotate(positions)))
    return y[0].transpose(0, 1)


@torch.no_grad()
def in_steps(m, drawn: list[tuple[Tensor, ...]], steps, pages: list[Tensor]) -> list[Tensor]:
    done, parts = [0] * len(drawn), [[] for _ in drawn]
    for step in steps:
        rows = [r for r, n in enumerate(step) if n]
        new = [slice(done[r], done[r] + step[r]) for r in rows]
        q, k, v = (torch.cat([drawn[r][i][part] for r, part in zip(rows, new, strict=True)]) for i in range(3))
        schedule = Schedule.of(
            [step[r] for r in rows], [done[r] for r in rows], torch.tensor([PAGES[r] for r in rows], dtype=torch.int32)
        )
        y = run(m, pages, q, k, v, schedule, lambda cache, at: context(unrotate(at), cache=cache))
        for r, part in zip(rows, y.split([step[r] for r in rows]), strict=True):
            parts[r].append(part)
            done[r] += step[r]
    return [torch.cat(part) for part in parts if part]


def empty_pages(m, padding: int = 24) -> list[Tensor]:
    """Parts of six pages, cut from one tensor of bytes as a server cuts them, all full of what another text left."""
    parts = layout(m, torch.float32)
    sizes = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in parts]
    raw = torch.full((6, sum(sizes) + padding), 0.7).to(torch.int8)
    cut = raw[:, : sum(sizes)].split(sizes, 1)
    pages = [x.view(dtype).view(-1, *shape) for x, (shape, dtype) in zip(cut, parts, strict=True)]
    for page in pages:
        page.fill_(3.5)
    return pages


@pytest.mark.parametrize(("name", "combine"), CASES)
def test_texts_in_the_steps_of_a_server_are_whole_texts(name: str, combine: str) -> None:
    torch.manual_seed(0)
    m = mixer(name=name, combine=combine, **SEED.get(name, {}))
    for parameter in m.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    drawn = texts()
    got = in_steps(m, drawn, STEPS, empty_pages(m))
    expected = [whole(m, *text) for text in drawn]
    assert_close(tuple(got), tuple(expected), 1e-5)


@pytest.mark.parametrize("name", ["gla", "gated_deltanet"])
def test_tokens_that_stay_exact_lie_in_the_page(name: str) -> None:
    torch.manual_seed(0)
    m = mixer(name=name, exact=6)
    if m.gate is not None:
        torch.nn.init.normal_(m.gate, std=0.5)
    drawn = texts()
    got = in_steps(m, drawn, STEPS, empty_pages(m))
    assert_close(tuple(got), tuple(whole(m, *text) for text in drawn), 1e-5)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*itertools.product(["gla", "kda", "clusters"], ["bfloat16", "int8"]), ("clusters", "int4")],
)
def test_states_in_fewer_bits_are_those_of_a_cache(name: str, dtype: str) -> None:
    torch.manual_seed(0)
    m = mixer(name=name, state_dtype=dtype, **SEED.get(name, {}))
    (drawn,) = texts()[:1]
    cache: Any = SimpleNamespace(layers=[LinearizedCacheLayer(m.window, m.sinks, late=m.late)])
    expected = []
    with torch.no_grad():
        for (n, _, _), seen in zip(STEPS, (0, 20, 21, 36, 36), strict=True):
            if n:
                at = slice(seen, seen + n)
                q, k, v = (x[at].transpose(0, 1)[None] for x in drawn)
                y = m(q, k, v, context(unrotate(torch.arange(seen, seen + n)[None]), cache=cache))
                expected.append(y[0].transpose(0, 1))
    steps = tuple((n, 0, 0) for n, _, _ in STEPS if n)
    assert_close(tuple(in_steps(m, [drawn, *texts()[1:]], steps, empty_pages(m))), (torch.cat(expected),), 1e-6)


@pytest.mark.parametrize("name", [name for name, cls in MIXERS.items() if not cls.keeps_source_cache])
def test_no_step_waits_for_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "is_free", lambda x: False)
    m = mixer(name=name, **SEED.get(name, {}))
    drawn, pages = texts(), empty_pages(m)
    with Blind():
        in_steps(m, drawn, STEPS, pages)


def test_a_request_that_lost_its_page_starts_anew_and_no_other_page_is_touched() -> None:
    torch.manual_seed(0)
    m = mixer(name="gla")
    drawn, pages = texts(), empty_pages(m)
    first = in_steps(m, drawn, ((20, 0, 0),), pages)  # preempted here: its page goes on to others
    again = in_steps(m, drawn, STEPS, pages)
    assert torch.equal(first[0], again[0][:20])
    for page in pages:
        assert all(bool((page[i] == 3.5).all()) for i in range(6) if i not in PAGES)


@pytest.mark.parametrize("name", ["window", "gla", "clusters", "kda"])
def test_a_page_takes_the_same_bytes_as_the_cache_of_a_row(name: str) -> None:
    m = mixer(name=name)
    size = page_bytes(layout(m, torch.bfloat16))
    assert size + torch.int64.itemsize == m.state_bytes(1, 2)  # a cache counts its tokens, a page does not


def test_decoding_requests_may_lie_anywhere() -> None:
    torch.manual_seed(0)
    m = mixer(name="kda")
    assert m.gate is not None
    torch.nn.init.normal_(m.gate)
    drawn = texts()
    steps = ((3, 5, 2), (1, 0, 1), (32, 0, 1), (1, 0, 20))
    schedule = Schedule.of([32, 1], [4, 4], torch.tensor([3, 4]))
    assert torch.equal(torch.as_tensor(schedule.decoding), torch.tensor([32]))
    got = in_steps(m, drawn, steps, empty_pages(m))
    assert_close(tuple(got), tuple(whole(m, *text) for text in drawn), 1e-5)
