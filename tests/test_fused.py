"""The compiled functions of a decode step against themselves uncompiled, and how many kernels they save.

torch's inductor compiles for the CPU here, as it does for a GPU but for the last step, in C++ in place of
Triton.
"""

import importlib.util
import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from model import decode as cache
from model import fused, generate, schedule
from model import sampling as sampling_module
from model.offload import Fallbacks
from model.schedule import Limits

sys.path.append(str(ROOT / "bench"))  # at the end: it has a rewards.py of its own
import launches  # noqa: E402
from shapes import random_prompt, random_vlm  # noqa: E402

needs_compiler = pytest.mark.skipif(
    not shutil.which("g++"), reason="torch.compile needs g++ on a CPU"
)


# ---- Equal -------------------------------------------------------------------------------------------------


def arguments(dtype, R, S, n, P, T, spare, kv=2, g=3, d=16, hidden=48, mlp=70, words=301):
    """For each function, with R rows and S prompts of P tokens; the caches are larger by `spare`."""
    rng, long = torch.Generator().manual_seed(R + P), torch.long
    normal = lambda *shape: torch.randn(shape, generator=rng).to(dtype)  # noqa: E731
    numbers = lambda top, *shape: torch.randint(top, shape, generator=rng)  # noqa: E731
    uniform = lambda *shape: torch.rand(shape, generator=rng)  # noqa: E731
    prompt = [normal((S + spare) * kv, P + spare, d)[: S * kv, :P] for _ in range(2)]
    keys, values = (normal(R + spare, kv, T + spare, d) for _ in range(2))
    near = (T + 1) // 2
    L = R // 3
    own = [x[:L, :, :T].flatten(0, 1) for x in (keys, values)]
    own += [x[L:R, :, :near].flatten(0, 1) for x in (keys, values)]
    unseen = fused.hide(torch.arange(P) >= 1 + numbers(P, S, 1, 1), kv)
    unwritten = fused.hide(torch.arange(T) > numbers(T, R, 1, 1), kv)
    cells, row_of_cell = torch.randperm(S * n, generator=rng)[:R], torch.zeros(S * n, dtype=long)
    row_of_cell[cells] = torch.arange(len(cells))
    count, inv_freq = torch.arange(P + T + spare), uniform(d // 2)
    tail = numbers(3, R)
    words_of_rows = numbers(9, R + spare, T + spare + 1)[:R]
    written = numbers(T + spare + 3, R)  # more than fit: a row that is finished
    probs, drawn = (normal(R, words).float() * 3).softmax(dim=1), uniform(R, 1) / 100
    state = numbers(9, R, 1), numbers(2, R, 1).bool(), uniform(R, 1)
    which = torch.arange(R)[: max(1, R // 2)]
    return {
        fused.embed_last: (
            *(words_of_rows, written, tail, numbers(99, R)),
            *(normal(9, hidden), normal(hidden), 1e-6),
        ),
        fused.begin: (
            *(tail + numbers(T, R), numbers(99, R), 1 + numbers(P, S)),
            *(count[:P], count[:T], inv_freq, 1.0, kv, dtype),
        ),
        fused.add_norm: (normal(R, hidden), normal(R, hidden), normal(hidden), 1e-6),
        fused.rotate_and_write: (
            *normal(R, (kv * g + 2 * kv) * d).split([kv * g * d, kv * d, kv * d], dim=1),
            *(normal(R, 1, d), normal(R, 1, d), numbers(T, R), keys[:R], values[:R]),
        ),
        fused.attend: (
            *(normal(R, kv, g, d), *prompt, *own, unseen, unwritten),
            *(row_of_cell.view(S, n), cells),
        ),
        fused.swiglu: normal(R, 2 * mlp).split(mlp, dim=1),  # as joined
        fused.uniform_numbers: (numbers(2**62, R), numbers(99, R), 5),
        fused.likelihoods: (normal(R, words).float(), 0.7),
        fused.draw: (probs, probs.cumsum(dim=1), state[2], 0.9),
        fused.likelier: (probs, drawn),
        fused.draw_again: (which, probs[which], probs[which].cumsum(dim=1), *state, 0.9),
    }


def tensors(x):
    parts = x if isinstance(x, (tuple, list)) else ()
    return [x] if isinstance(x, torch.Tensor) else [t for part in parts for t in tensors(part)]


def copied(args):
    """The same numbers, in memory of its own, as far apart as they were."""
    return [x.clone() if isinstance(x, torch.Tensor) and x.is_contiguous() else x for x in args]


# Rows, prompts, samples of each, tokens of a prompt and of a row, and by how much the caches are larger. The
# second of a pair may not compile again; 1 and full caches are sizes that torch.compile treats apart.
SIZES = [
    (7, 3, 3, 37, 11, 2),
    (12, 5, 4, 64, 30, 9),
    (8, 2, 4, 16, 8, 0),
    (1, 1, 1, 5, 1, 1),
    (3, 1, 4, 9, 4, 0),
]


@needs_compiler
@pytest.mark.parametrize("function", fused.CHANGING, ids=lambda function: function.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@torch.no_grad()
def test_compiled_it_gives_the_same(function, dtype):
    """Float32: other orders of summing, a few times 1e-7 of numbers up to 10. bfloat16: what is plain rounds
    after every operation, what is compiled at the end, so a few of the 8 bits are the last that agree."""
    torch._dynamo.reset()
    counters, fallbacks = torch._dynamo.utils.counters["stats"], Fallbacks()
    fast, compiled = getattr(fused.compiled(fallbacks), function.__name__), []
    near = dict(atol=2e-6, rtol=2e-6) if dtype == torch.float32 else dict(atol=0.06, rtol=0.03)
    before = counters["unique_graphs"]
    for size in SIZES:
        args = arguments(dtype, *size)[function]
        ours, theirs = copied(args), copied(args)
        got, want = tensors(fast(*ours)), tensors(function(*theirs))
        assert fallbacks.compile, "it was compiled"
        compiled.append(counters["unique_graphs"] - before)
        for a, b in zip(got + tensors(ours), want + tensors(theirs), strict=True):
            assert a.dtype == b.dtype and torch.allclose(a.float(), b.float(), **near), (
                (a - b).abs().max()
            )
    assert compiled[:2] == [1, 1] and compiled[-1] <= 5, "once for many sizes"


@needs_compiler
@pytest.mark.parametrize("size", ["tiny", "qwen3-tiny"])
def test_a_compiled_step_writes_the_same_tokens(monkeypatch, size):
    """Whole rollouts on the CPU, compiled and with projections merged, in which rows come and go."""
    torch._dynamo.reset()
    vlm = random_vlm(size, "cpu", "float32")
    vlm.end_ids = [vlm.end_ids[0], *range(3, 500, 11)]
    rng, fallbacks = torch.Generator().manual_seed(1), Fallbacks()
    for p in vlm.model.parameters():
        p.data += 0.12 * torch.randn(p.shape, generator=rng)
    prompts = [random_prompt(vlm, 50 + 7 * i, i) for i in range(5)]
    limits = lambda vlm, prefixes, prefix, own, n: Limits(2 * n, 2, n, prefix, own)  # noqa: E731
    monkeypatch.setattr(generate, "limits_in_memory", limits)
    monkeypatch.setitem(schedule.BUCKETS, "cpu", (4, 1, 2, 2, 16, 8))
    monkeypatch.setitem(schedule.NEAR, "cpu", 6)

    def texts():
        greedy = generate.generate(vlm, prompts, 3, 12, temperature=0.0)
        rng = torch.Generator().manual_seed(0)
        return greedy, generate.generate(vlm, prompts, 3, 12, top_p=0.9, generator=rng)

    class Compiled(cache.Rows):
        def __init__(self, *args):
            super().__init__(*args)
            self.pieces = fused.compiled(fallbacks)
            layers = vlm.model.model.language_model.layers
            merged = [cache._layer_products(cache._linears(layer), True, True) for layer in layers]
            self.products = merged

    want = texts()
    monkeypatch.setattr(generate, "Rows", Compiled)
    assert texts() == want and fallbacks.compile
    assert len({len(ids) for group in want[0] for ids in group}) > 2, "they end at different times"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_logits_are_written_into_their_rows_only(dtype):
    rng = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=rng).to(dtype) for n in (3, 50))
    rows = torch.full((5, 50), torch.nan)
    fused.float_logits(hidden, weight, out=rows[:3])
    near = dict(atol=2e-6) if dtype == torch.float32 else dict(rtol=2**-8)  # bfloat16 has 8 bits
    assert torch.allclose(rows[:3], hidden.float() @ weight.float().T, **near)
    assert rows[3:].isnan().all()


def test_what_cannot_be_compiled_goes_on_plain(monkeypatch, capsys):
    """One try and one line on stderr, and memory that runs out is no reason to stop compiling."""

    def broken(function, fullgraph):
        def call(*args):
            tried.append(function.__name__)
            raise error

        return call

    monkeypatch.setattr(torch, "compile", broken)
    fallbacks, tried, x = SimpleNamespace(compile=True), [], torch.ones(2, 3)
    pieces = fused.compiled(fallbacks)
    error = torch.OutOfMemoryError("full")
    with pytest.raises(torch.OutOfMemoryError):
        pieces.swiglu(x, x)
    assert fallbacks.compile and not capsys.readouterr().err
    error = RuntimeError("no Triton")
    for _ in range(3):
        assert torch.equal(pieces.swiglu(x, x), fused.swiglu(x, x))
        assert torch.equal(
            fused.compiled(fallbacks).likelier(x, x[:, :1]), fused.likelier(x, x[:, :1])
        )
    said = capsys.readouterr().err
    assert tried == ["swiglu"] * 2 and said == "decoding without compiled kernels: no Triton\n"


# ---- Few ---------------------------------------------------------------------------------------------------


def test_a_step_at_the_3b_shape_launches_few_kernels():
    """Of 256 rows and 32 prompts of 1,100 tokens, with sampling; see bench/launches.py for how it counts."""
    plain, fast = launches.launches(False), launches.launches(True)
    numbers = [
        sum(launches.total(part, launches.KERNELS) for part in kind) for kind in (plain, fast)
    ]
    assert numbers[0] > 2900 and numbers[1] <= 700
    assert fast[0].inside["attend"] == 36 and fast[0].inside["add_norm"] == 72
    assert fast[0].outside["mm"] + fast[0].outside["addmm"] == 36 * 5 + 1
    masks = {"ge", "gt", "arange", "masked_fill", "bitwise_not"}
    assert plain[0].outside["ge"] == plain[0].outside["gt"] == 1, "masks are made once a step"
    assert not masks & set(fast[0].outside)


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")
@pytest.mark.skipif(
    torch.version.cuda is not None and not torch.cuda.is_available(),
    reason="torch asks a driver that is not there",
)
def test_torch_schedules_as_many_kernels_as_are_written_down():
    command = [sys.executable, str(ROOT / "bench" / "launches.py"), "--schedule", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])["kernels"] == launches.KERNELS


# ---- The rows that draw again ------------------------------------------------------------------------------


@pytest.mark.parametrize("top_p", [0.5, 0.7, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("rows", [1, 8, 64, 256, 3000])
def test_enough_rows_draw_again(rows, top_p):
    """No more are outside after the first draw, but once in a billion; and not many more than that."""
    from scipy.stats import binom

    most = sampling_module._rows_outside(rows, top_p)
    assert binom.sf(most, rows, 1 - top_p) < 1.1e-9
    assert most == rows or rows * top_p < 1 or binom.sf(most - 2, rows, 1 - top_p) > 1e-10
