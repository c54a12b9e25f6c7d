"""How many kernels a decode step launches at the 3B shape, plain and compiled. Nothing is computed.

    python bench/launches.py                  from the kernels that are written down here
    python bench/launches.py --schedule       asks torch.compile again (pip install triton)
    python bench/launches.py --long           with 128 rows that have more than 384 tokens

The step and the sampling run on meta tensors, and every operation of torch counts as one kernel, unless it
only makes a view or reserves memory. What is compiled counts as many kernels as torch.compile makes of it
for an H100: its scheduler and its code generator run here on a pretended one, and with --schedule Triton
translates what they wrote for that GPU, too. Nothing of it has run on a GPU.
"""

import argparse
import collections
import json
import re
import sys
from types import SimpleNamespace
from unittest import mock

import torch
from shapes import random_vlm
from torch.utils._python_dispatch import TorchDispatchMode

from model import decode as cache
from model import fused, sampling
from model.lora import add_lora
from model.schedule import Limits

# As counted by --schedule with torch 2.13 and Triton 3.7.1; matrix products included.
KERNELS = dict(embed_last=1, begin=3, add_norm=1, rotate_and_write=2, attend=8, swiglu=1)
KERNELS |= dict(uniform_numbers=1, likelihoods=6, draw=3, likelier=1, draw_again=4)
NO_KERNEL = {
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "_unsafe_view",
    "detach",
    "scalar_tensor",
}
LIMITS = Limits(rows=256, slots=32, cells=16, prefix_tokens=1050, own_tokens=612)
SHAPE = (256, 0, 32, 16, 1050, 256, 256)
LONG = (256, 128, 32, 16, 1050, 384, 612)  # attend is 11 kernels then


class Launches(TorchDispatchMode):
    """Counts the operations that launch a kernel; those inside of what is compiled not."""

    def __init__(self):
        super().__init__()
        self.outside, self.inside, self.arguments = collections.Counter(), collections.Counter(), {}
        self.compiled = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not (self.compiled or func.is_view or name in NO_KERNEL):
            self.outside[name] += 1
        return func(*args, **(kwargs or {}))

    def piece(self, function):
        """Stands for a function of `fused`, compiled."""

        def call(*args):
            self.inside[function.__name__] += 1
            self.arguments.setdefault(function, args)
            self.compiled = True
            try:
                return function(*args)
            finally:
                self.compiled = False

        return call


def bmm_of_cuda(q, keys):
    """`fused.float_scores` as it is on a GPU, in bfloat16."""
    return torch.bmm(q, keys.transpose(1, 2), out_dtype=torch.float32)


def mm_of_cuda(hidden, weight, out):
    """`fused.float_logits` as it is on a GPU, in bfloat16."""
    return torch.mm(hidden, weight.T, out_dtype=torch.float32, out=out)


def launches(
    compiled: bool, size: str = "3b", lora_rank: int = 0, merged: bool = True, shape=SHAPE
) -> tuple[Launches, Launches]:
    """What one step and one sampling of 256 rows launch; merged: there is room for copies of weights."""
    vlm, step, draw = random_vlm(size, "meta", "bfloat16"), Launches(), Launches()
    if lora_rank:
        with torch.device("meta"):
            add_lora(vlm.model, lora_rank)
    layers = vlm.model.model.language_model.layers
    merge = (compiled and merged, compiled and merged and lora_rank > 0)
    with (
        torch.no_grad(),
        mock.patch.object(fused, "float_scores", bmm_of_cuda),
        mock.patch.object(fused, "float_logits", mm_of_cuda),
    ):
        products = [cache._layer_products(cache._linears(layer), *merge) for layer in layers]
        rows = cache.Rows(vlm, LIMITS, 512, products)

        def sample() -> None:
            rows.logits.index_fill_(1, rows.banned_ids, -torch.inf)
            uniform = lambda n: rows.pieces.uniform_numbers(rows.seeds, rows.written, n)  # noqa: E731
            sampling.sample(rows.logits, 1.0, 0.99, 0, uniform, rows.pieces)

        for counting, work in (
            (step, lambda: cache.step(vlm, rows, *shape)),
            (draw, sample),
        ):
            if compiled:
                rows.pieces = SimpleNamespace(
                    **{f.__name__: counting.piece(f) for f in fused.CHANGING}
                )
            with counting:
                work()
    return step, draw


def total(counted: Launches, kernels: dict[str, int]) -> int:
    """All launches; kernels: of each compiled function."""
    inside = sum(calls * kernels[name] for name, calls in counted.inside.items())
    return inside + sum(counted.outside.values())


# ---- What torch.compile makes for a GPU that is not there --------------------------------------------------


def scheduled(arguments: dict) -> dict[str, int]:
    """The launches of each function as torch.compile schedules it for an H100, with these arguments.

    The function is traced on fake tensors of the CPU, and the graph is then said to be of cuda:0.
    """
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.compile_fx import compile_fx_inner, select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    pretend_h100()
    written, generate_code = [], GraphLowering.codegen

    def codegen(graph):
        written.append(generate_code(graph)[0].value)
        raise InterruptedError("all that is wanted")

    def on_gpu(x):
        if not isinstance(x, torch.Tensor):
            return [on_gpu(y) for y in x] if isinstance(x, (tuple, list)) else x
        with x.fake_mode:
            return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="cuda")

    def compiler(graph, example):
        for node in graph.graph.nodes:
            if "val" in node.meta:
                node.meta["val"] = on_gpu(node.meta["val"])
            if "device" in node.kwargs:
                node.kwargs = dict(node.kwargs, device=torch.device("cuda", 0))
        return compile_fx_inner(graph, on_gpu(example))

    table, counts = select_decomp_table(), {}
    backend = aot_autograd(
        fw_compiler=compiler,
        inference_compiler=compiler,
        decompositions=table,
        keep_inference_input_mutations=True,
    )
    for function, args in arguments.items():
        with (
            torch.no_grad(),
            mock.patch.object(GraphLowering, "codegen", codegen),
            mock.patch.object(fused, "float_scores", bmm_of_cuda),
            FakeTensorMode(shape_env=ShapeEnv()),
        ):
            fake = [
                torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
                if isinstance(x, torch.Tensor)
                else x
                for x in args
            ]
            try:
                fused.mark(fake, fused.CHANGING[function])
                torch.compile(function, fullgraph=True, backend=backend)(*fake)
            except Exception:
                if not written:
                    raise
        translate(written[-1])
        body = written.pop()[1:].partition("def call")[2]
        counts[function.__name__] = len(
            re.findall(r"\.run\(|extern_kernels\.\w+\(|torch\.ops\.aten\S+\(", body)
        )
    return counts


def pretend_h100() -> None:
    """Lets torch's code generator and Triton believe in a GPU, for the rest of this process."""
    import torch._inductor.fx_passes.joint_graph as joint
    import torch._inductor.fx_passes.post_grad as post
    import torch._inductor.runtime.triton_helpers as helpers
    import torch._inductor.runtime.triton_heuristics as heuristics
    import triton
    from triton.backends.compiler import GPUTarget

    memory = dict(total_memory=80 << 30, shared_memory_per_block=48 << 10, gcnArchName="")
    memory |= dict(shared_memory_per_block_optin=227 << 10, regs_per_multiprocessor=65536)
    size = dict(multi_processor_count=132, max_threads_per_multi_processor=2048, warp_size=32)
    card = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, **memory, **size)
    functions = dict(
        is_available=True, device_count=1, current_device=0, get_device_capability=(9, 0)
    )
    functions |= dict(
        get_device_properties=card, _get_device_properties=card, is_bf16_supported=True
    )
    functions |= dict(
        _lazy_init=None, synchronize=None, get_device_name=card.name, set_rng_state=None
    )
    functions |= dict(
        get_rng_state=torch.zeros(16, dtype=torch.uint8),
        _exchange_device=0,
        _maybe_exchange_device=0,
    )
    for name, value in functions.items():
        setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    torch.cuda.random.get_rng_state = torch.cuda.get_rng_state
    torch.cuda.random.set_rng_state = torch.cuda.set_rng_state
    torch.version.cuda = "13.0"
    driver = dict(
        get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0
    )
    triton.runtime.driver.set_active(SimpleNamespace(**driver, is_active=lambda: True))
    joint.lazy_init = post.lazy_init = lambda *_: None  # patterns that are traced on a true GPU
    helpers.set_driver_to_gpu = lambda: None
    heuristics.CachingAutotuner._make_launchers = lambda self: None
    torch._inductor.config.compile_threads = 1


def translate(module: str) -> None:
    """Triton translates every kernel in it to an H100's machine code, or raises."""
    from torch._inductor.codecache import PyCodeCache

    for name, source in re.findall(
        r"async_compile\.triton\('(\w+)', '''(.*?)'''", module, re.DOTALL
    ):
        getattr(PyCodeCache.load(source), name).precompile(warm_cache_only=False)


# ---- What is shown -----------------------------------------------------------------------------------------


def main() -> None:
    """Prints both totals, and what each compiled function launches."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--schedule", action="store_true", help="ask torch.compile for an H100 again"
    )
    parser.add_argument("--long", action="store_true", help="some rows are long")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    shape = LONG if args.long else SHAPE
    plain, fast = launches(False, shape=shape), launches(True, shape=shape)
    lora = dict(lora=launches(True, lora_rank=16, shape=shape))
    lora["lora, no room to merge"] = launches(True, lora_rank=16, merged=False, shape=shape)
    # Those with LoRA: gate and up are parts of one tensor.
    step, sampling = lora["lora"]
    arguments = step.arguments | sampling.arguments
    known = KERNELS | dict(attend=11) if args.long else KERNELS
    kernels = scheduled(arguments) if args.schedule else known
    results = dict(kernels=kernels)
    for name, kind in (dict(plain=plain, compiled=fast) | lora).items():
        step, sampling = (total(part, kernels) for part in kind)
        results[name] = dict(step=step, sampling=sampling, both=step + sampling)
    if args.json:
        print(json.dumps(results))
        return
    for name, numbers in results.items():
        print(f"{name}: {', '.join(f'{k} {v}' for k, v in numbers.items())}")


if __name__ == "__main__":
    sys.exit(main())
