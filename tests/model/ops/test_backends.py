"""The choice between PyTorch and fla's kernels, and the way to and from fla's layout.

There is no GPU here: a module `fla` made of plain forms in fla's layout and with fla's signatures stands for the
kernels, and CPU tensors count as CUDA ones. The stand-ins refuse what fla's asserts refuse, and take differences of
prefix sums where its kernels do. scripts/check_kernels.sh runs the kernels themselves.
"""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers.oracles import fla_naive
from torch import Tensor
from torch.nn import functional as F

from linearize.errors import InputError
from linearize.model import ops
from linearize.model.ops import additive, expansion, fla_backend, run_additive, run_delta, slots

B, H, G, T, K, V, M = 2, 6, 2, 20, 8, 5, 4


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv("LINEARIZE_BACKEND", raising=False)
    caches = fla_backend.missing, fla_backend.unsound, ops._warn
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def check_arguments(q, k, v, g, initial_state):
    """What all kernels ask for; chunk_bwd_dv, behind most of them, refuses odd widths in 16 bits."""
    assert q.shape == k.shape and v.shape[:3] == q.shape[:3] and q.dtype == k.dtype == v.dtype
    assert all(x is None or x.is_contiguous() for x in (q, k, v, g, initial_state))
    assert g is None or g.dtype == torch.float32
    assert initial_state is None or initial_state.dtype == torch.float32
    assert q.dtype == torch.float32 or q.shape[-1] % 2 == v.shape[-1] % 2 == 0, "requires even K and V"


def gla(q, k, v, g, scale=None, initial_state=None, output_final_state=False):
    """fla's additive kernels as one chunk; q, k, v are as exact as their dtype, sums fp32."""
    check_arguments(q, k, v, g, initial_state)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if g is None or g.dim() == 3:
        g = q.new_zeros(q.shape[:3]).float().unsqueeze(-1) if g is None else g.unsqueeze(-1)
    q_, k_, v_, total = (x.float().transpose(1, 2) for x in (q * scale, k, v, g.cumsum(1)))
    decay = (total.unsqueeze(3) - total.unsqueeze(2)).exp()  # [B, H, i, j, 1 or K]
    y = (torch.einsum("bhik,bhjk,bhijk->bhij", q_, k_, decay.expand(*decay.shape[:4], q.shape[-1])).tril()) @ v_
    final = (k_ * (total[:, :, -1:] - total).exp()).mT @ v_
    if initial_state is not None:
        y = y + (q_ * total.exp()) @ initial_state
        final = final + total[:, :, -1:].exp().mT * initial_state
    return y.transpose(1, 2).to(q.dtype), final if output_final_state else None


@pytest.fixture
def kernels(monkeypatch) -> list[str]:
    """A fake fla; the list fills with the names of the kernels that were called."""
    calls: list[str] = []
    fakes: dict[str, ModuleType] = {}

    def kernel(module: str, name: str, form) -> None:
        def called(*args, **kwargs):
            calls.append(name)
            return form(*args, **kwargs)

        full = f"fla.ops.{module}"
        if full not in fakes:
            fakes[full] = ModuleType(full)
            monkeypatch.setitem(sys.modules, full, fakes[full])
        setattr(fakes[full], name, called)

    def gla_by_channel(q, k, v, g, **rest):
        assert g.shape == q.shape
        return gla(q, k, v, g, **rest)

    def simple(q, k, v, g=None, **rest):
        assert g is None or g.shape == q.shape[:3]
        return gla(q, k, v, g, **rest)

    def delta(q, k, v, beta, **rest):
        assert q.dtype != torch.float32
        return gated_delta(q, k, v, torch.zeros_like(beta, dtype=torch.float32), beta, **rest)

    def gated_delta(q, k, v, g, beta, initial_state, **rest):
        check_arguments(q, k, v, g, initial_state)
        assert g.shape == beta.shape == q.shape[:3] and q.shape[-1] <= 256
        form = fla_naive("gated_delta_rule").naive_recurrent_gated_delta_rule
        return form(q, k, v, beta, g, initial_state=initial_state, **rest)

    def kda(q, k, v, g, beta, initial_state, **rest):
        check_arguments(q, k, v, g, initial_state)
        assert g.shape == q.shape and beta.shape == q.shape[:3] and q.shape[-1] <= 256
        return fla_naive("kda").naive_recurrent_kda(q, k, v, g, beta, initial_state=initial_state, **rest)

    def gsa(q, k, v, s, g, scale, initial_state, output_final_state):
        assert q.dtype == k.dtype == v.dtype == s.dtype and g.dtype == torch.float32 and s.shape == g.shape
        assert all(x.is_contiguous() for x in (q, k, v, s, g, *initial_state))
        y, final = fla_naive("gsa").naive_recurrent_gsa(q, k, v, s, g.float(), scale, initial_state, output_final_state)
        return y, list(final)

    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    kernel("gla", "chunk_gla", gla_by_channel)
    kernel("simple_gla", "chunk_simple_gla", simple)
    kernel("delta_rule", "chunk_delta_rule", delta)
    kernel("gated_delta_rule", "chunk_gated_delta_rule", gated_delta)
    kernel("kda", "chunk_kda", kda)
    kernel("gsa", "chunk_gsa", gsa)
    monkeypatch.setattr(ops, "on_gpu", lambda x: True)
    return calls


def inputs(decay: str = "channel", dtype: torch.dtype = torch.float32, tokens: int = T) -> dict[str, Tensor | None]:
    width = {"none": 0, "head": 1, "fixed": 1, "channel": K}[decay]
    g = F.logsigmoid(torch.randn(B, G, tokens, width)) if width else None
    return {
        "q": torch.randn(B, H, tokens, K, dtype=dtype),
        "k": torch.randn(B, G, tokens, K, dtype=dtype),
        "v": torch.randn(B, G, tokens, V, dtype=dtype),
        # "fixed": [G, 1, 1], one number per head for all tokens.
        "log_decay": -torch.rand(G, 1, 1) if decay == "fixed" else g,
    }


def assert_close(got, expected, limit: float = 1e-5) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = a.detach().float(), b.detach().float()
        assert float((a - b).abs().max()) <= limit * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("decay", ["none", "head", "fixed", "channel"])
@pytest.mark.parametrize("with_state", [True, False])
def test_additive_kernels_get_and_return_our_layout(kernels, decay, with_state):
    x = inputs(decay)
    state = torch.randn(B, G, K, V) if with_state else None
    assert_close(run_additive(**x, state=state), additive.recurrent(**x, state=state))
    assert kernels == ["chunk_gla" if decay == "channel" else "chunk_simple_gla"]


def test_gradients_go_through_the_expansion_of_groups(kernels):
    x = {n: t.requires_grad_() for n, t in inputs().items()}
    state = torch.randn(B, G, K, V, requires_grad=True)

    def gradients(backend):
        y, final = run_additive(**x, state=state, backend=backend)
        return torch.autograd.grad(y.square().sum() + final.square().sum(), [*x.values(), state])

    assert_close(gradients("fla"), gradients("torch"), 1e-4)
    assert kernels == ["chunk_gla"]


def test_half_precision_keeps_a_float_state(kernels):
    x = inputs(dtype=torch.bfloat16)
    y, state = run_additive(**x)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32 and kernels == ["chunk_gla"]


@pytest.mark.parametrize(
    ("decay", "dtype", "name"),
    [
        ("none", torch.float32, "chunk_gated_delta_rule"),
        ("none", torch.bfloat16, "chunk_delta_rule"),
        ("head", torch.float32, "chunk_gated_delta_rule"),
        ("channel", torch.float32, "chunk_kda"),
    ],
)
def test_delta_kernels_get_and_return_our_layout(kernels, decay, dtype, name):
    x, state = inputs(decay, dtype), torch.randn(B, G, K, V)
    x["k"] = F.normalize(x["k"], dim=-1)
    beta = torch.rand(B, G, T, 1)
    y, final = run_delta(**x, beta=beta.to(dtype), state=state)
    assert kernels == [name]
    q, k, v = (t.float() for t in (x["q"], x["k"], x["v"]))
    S, expected = state, []
    for t in range(T):
        if x["log_decay"] is not None:
            S = S * x["log_decay"][:, :, t, :, None].exp()
        key = k[:, :, t, None]
        S = S + key.mT @ (beta[:, :, t, None] * (v[:, :, t, None] - key @ S))
        expected.append((q[:, :, t, None] @ S.repeat_interleave(H // G, 1)).squeeze(2))
    # bf16: the rounding of beta and of the output.
    assert_close((y, final), (torch.stack(expected, 2).to(dtype), S), 1e-5 if dtype == torch.float32 else 2e-2)


def test_slot_kernel_gets_and_returns_our_layout(kernels):
    x = inputs()
    g = F.logsigmoid(torch.randn(B, G, T, M))
    x |= {"input_gate": -torch.expm1(g), "log_decay": g}
    state = torch.randn(B, G, K, M), torch.randn(B, G, M, V)
    y, final = slots.run(**x, state=state)
    expected, last = slots.recurrent(**x, state=state)
    assert_close((y, *final), (expected, *last))
    assert kernels == ["chunk_gsa"]


def test_the_choice(kernels, monkeypatch):
    x = inputs()
    for forced in (None, "torch", "fla"):
        for variable in (None, "torch", "fla"):
            kernels.clear()
            if variable is None:
                monkeypatch.delenv("LINEARIZE_BACKEND", raising=False)
            else:
                monkeypatch.setenv("LINEARIZE_BACKEND", variable)
            run_additive(**x, backend=forced)
            assert bool(kernels) == ((forced or variable or "fla") == "fla"), "the keyword comes before the variable"
    monkeypatch.setenv("LINEARIZE_BACKEND", "flaa")
    with pytest.raises(InputError, match="'flaa'.*Did you mean 'fla'"):
        run_additive(**x)


def test_what_the_kernels_cannot_do_runs_in_pytorch_and_is_said_once(kernels):
    wide = {"q": torch.randn(1, 1, 3, 300), "k": torch.randn(1, 1, 3, 300), "v": torch.randn(1, 1, 3, 2)}
    beta = torch.rand(1, 1, 3, 1)
    with pytest.warns(UserWarning, match="256 wide, and these are 300") as warned:
        y = run_delta(**wide, beta=beta)
    assert len(warned) == 1 and not kernels
    assert_close(run_delta(**wide, beta=beta), y)  # a second warning would be an error
    with pytest.warns(UserWarning, match="32 bits or fewer"):
        run_additive(**{n: t.double() for n, t in inputs().items()})
    with pytest.raises(InputError, match="256 wide.*allowed here: torch"):
        run_delta(**wide, beta=beta, backend="fla")
    run_additive(q=torch.randn(1, 1, 3, 320), k=torch.randn(1, 1, 3, 320), v=torch.randn(1, 1, 3, 272))
    assert kernels == ["chunk_simple_gla"], "only those of the delta rule are as narrow"


@pytest.mark.parametrize("decay", ["none", "head", "channel"])
@pytest.mark.parametrize("run", [run_additive, run_delta], ids=["additive", "delta"])
def test_odd_widths_in_16_bits_have_a_gradient(kernels, run, decay):
    """The expansion hands over [v | 1]: a head of 64 is 65 wide."""
    x = inputs(decay, torch.bfloat16)
    x["q"], x["k"] = (F.pad(x[name], (0, -1)) for name in ("q", "k"))  # 7 wide
    x["log_decay"] = F.pad(x["log_decay"], (0, -1)) if decay == "channel" else x["log_decay"]
    rest = {} if run is run_additive else {"beta": torch.rand(B, G, T, 1).bfloat16()}
    x["k"] = F.normalize(x["k"], dim=-1)
    state = torch.randn(B, G, K - 1, V)
    leaves = [t.requires_grad_() for t in (*x.values(), state) if t is not None]

    def both(backend):
        y, final = run(**x, **rest, state=state, backend=backend)
        return y, final, *torch.autograd.grad(y.float().square().sum() + final.square().sum(), leaves)

    assert_close(both("fla"), both("torch"), 3e-2)
    assert len(kernels) == 1


@pytest.mark.parametrize("strength", [1000.0, 41000.0])
@pytest.mark.parametrize("decay", ["head", "channel"])
def test_a_strong_decay_does_not_cost_the_digits_of_a_mild_one(kernels, decay, strength):
    """One token in six wipes the state out. rwkv6 decays by 41,000 at a key of 20."""
    x, state = inputs(decay), torch.randn(B, G, K, V)
    x["log_decay"] = torch.where(torch.rand_like(x["log_decay"]) < 1 / 6, -strength, x["log_decay"])
    assert_close(run_additive(**x, state=state), additive.recurrent(**x, state=state), 1e-4)
    assert kernels


@pytest.mark.parametrize("mean", [0.0, 8.0, -30.0])
def test_an_expansion_keeps_its_digits_in_16_bits(kernels, mean):
    """Keys have a part in common, as real ones have: the scores of a query are all near `mean`."""
    common, scaling = torch.randn(K), 0.3
    q = torch.randn(B, H, T, K) + common
    k = torch.randn(B, G, T, K) + common * (mean / scaling / float(common @ common))
    one, g = torch.ones(B, G, T, 1), F.logsigmoid(torch.randn(B, G, T, 1)) / 8
    k1, v1 = torch.cat([k, one], -1), torch.cat([torch.randn(B, G, T, V), one], -1)
    k1[:, :, 5:7], v1[:, :, 5:7], g[:, :, 5:7] = 0, 0, 0  # tokens that do not exist
    low = q.bfloat16(), k1.bfloat16(), v1.bfloat16(), g
    state = expansion.initial_state(B, G, K, V, q.device)
    state = expansion.run(*(x.flip(2) for x in low), state=state, scaling=scaling, strength=1.5)[2]

    def both(backend):
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("LINEARIZE_BACKEND", backend)
            y, weight, final = expansion.run(*low, state=state, scaling=scaling, strength=1.5)
        return y, weight, *final

    for got, exact in zip(both("fla"), both("torch"), strict=True):
        assert float((got - exact).abs().max()) < 1e-2 * max(1.0, float(exact.abs().max()))
    assert kernels


@pytest.mark.parametrize(
    ("triton", "generation", "sound"),
    [("3.6.0", 9, False), ("3.7.0", 9, False), ("3.7.1", 9, True), ("3.3.1", 9, True), ("3.6.0", 8, True)],
)
def test_a_triton_that_is_wrong_on_hopper_is_left_alone(triton, generation, sound, kernels, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (generation, 0))
    monkeypatch.setattr(fla_backend, "version", lambda name: triton)
    reason = fla_backend.unsound(torch.device("cuda"))
    assert (reason is None) == sound and (sound or f"triton {triton}" in reason and "triton>=3.7.1" in reason)
    if sound:
        return
    monkeypatch.setattr(fla_backend, "unsound", lambda device: reason)
    x = inputs()
    with pytest.warns(UserWarning, match=f"kernels are not used: triton {triton} computes wrong gradients"):
        y = run_additive(**x)
    assert_close(run_additive(**x), additive.chunked(**x), 0)  # and not warned of again
    assert_close(y, additive.chunked(**x), 0)
    assert not kernels
    with pytest.raises(InputError, match="wrong gradients on a Hopper GPU.*allowed here: torch"):
        run_additive(**x, backend="fla")


def test_without_a_gpu_or_without_kernels(monkeypatch):
    x = inputs()
    expected = additive.chunked(**x)
    assert all(torch.equal(a, b) for a, b in zip(run_additive(**x), expected, strict=True))
    with pytest.raises(InputError, match="on cpu.*CUDA"):
        run_additive(**x, backend="fla")
    # None in sys.modules is how Python says that a module cannot be imported.
    monkeypatch.setitem(sys.modules, "fla.ops.gla", None)
    monkeypatch.setattr(ops, "on_gpu", lambda x: True)
    assert all(torch.equal(a, b) for a, b in zip(run_additive(**x), expected, strict=True))
    with pytest.raises(InputError, match=r"cannot be imported.*linearize\[cuda\]"):
        run_additive(**x, backend="fla")


def test_importing_the_recurrences_imports_torch_alone():
    # The packages around them register the model type with transformers; bare modules stand for them.
    code = """
import sys, types
for name, folder in (("linearize", sys.argv[1]), ("linearize.model", sys.argv[1] + "/model")):
    package = sys.modules[name] = types.ModuleType(name)
    package.__path__ = [folder]
import linearize.model.ops
print([name for name in ("fla", "transformers", "triton", "einops") if name in sys.modules])
"""
    folder = str(Path(ops.__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
