"""The CUDA path on a machine without a GPU: the cases of pretended_cases.py, and mistakes that they must see.

    pytest tests/test_pretended_gpu.py
    python tests/test_pretended_gpu.py greedy_rollout      some cases or mistakes, with their tracebacks

All run in one other process, each in a fork of it, as torch and the project are changed in there.
"""

import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
sys.path.append(str(ROOT / "bench"))  # at the end: it has a rewards.py of its own

import pretended_rules  # noqa: E402, F401  its cases are in CASES
from pretended_cases import CASES, tiny  # noqa: E402

# Planted into the project's source one by one: a simulator that sees nothing would pass all cases.
# MODULE, the case that must see it: WHAT, then what stands there and what is put in its place.
PLANTED = """
model.fused, greedy_rollout: an index made on the CPU
- row = torch.arange(len(index), device=index.device)
+ row = torch.arange(len(index))

model.decode, greedy_rollout: a number asked for in the step
- embeddings = model.embed_tokens.weight
+ embeddings = model.embed_tokens.weight + 0 * int(rows.prefix_length.max())

model.decode, greedy_rollout: a random number in the step
- embeddings = model.embed_tokens.weight
+ embeddings = model.embed_tokens.weight + 0 * torch.rand(1, device=vlm.device)

model.decode, greedy_rollout: a list copied in the step
- out=rows.logits[:R])
+ out=rows.logits[:R]).add_(torch.tensor([0.0] * R, device=x.device)[:, None])

model.decode, greedy_rollout: logits at a new address in each step
- fused.float_logits(
+ rows.logits = rows.logits.clone(); fused.float_logits(

model.decode, greedy_rollout: a Python number that changes from step to step
- rows.written[:R],
+ rows.written[:R] * 0 + next(rows.__dict__.setdefault("calls", iter(range(1, 10**9)))),

model.decode, greedy_rollout: compiled for the first time in a capture
- graph = torch.cuda.CUDAGraph()
+ graph = torch.cuda.CUDAGraph(); step.args[1].pieces = fused.compiled(vlm.fallbacks)

model.fused, a_compiler_that_fails: compiling is tried again in every call
- fallbacks.compile = False
+ pass

model.fused, a_compiler_that_fails: a compiler that fails ends it all
- except Exception as error:
+ except SyntaxError as error:

model.fused, greedy_rollout: a kernel that there is not
- if q.is_cuda and q.dtype != torch.float32:
+ if q.is_cuda:

model.fused, bfloat16_logits: logits rounded to bfloat16
- if hidden.is_cuda:
+ if False:

model.fused, greedy_rollout: a kernel for logits that there is not
- if hidden.dtype == torch.float32:
+ if False:

model.decode, a_capture_that_fails: the stream of a broken capture stays
- torch.cuda.set_stream(stream)
+ pass

model.decode, a_capture_that_fails: the allocator is not told of a broken capture
- torch._C._cuda_endAllocateToPool(index, pool)
+ pass

model.decode, a_capture_that_fails: a capture is tried again in every call
- vlm.fallbacks.graphs = False
+ pass

model.decode, out_of_memory_in_a_rollout: out of memory is taken for a capture that fails
- if isinstance(error, torch.OutOfMemoryError):
+ if False:

model.sampling, sampled_rollout: a wait in sampling
- if on_cpu and not outside.any():
+ if not outside.any():

model.sampling, sampled_rollout: asked which rows draw again
- which = outside[:, 0].int().topk(
+ which = outside[:, 0].nonzero()[:, 0]; outside[:, 0].int().topk(

model.sampling, nucleus: too few rows draw again
- count = _rows_outside(len(probs), top_p)
+ count = 1

model.sampling, nucleus: rows that are inside draw again, too
- which, left, left.cumsum(dim=1), token, outside, numbers
+ which, left, left.cumsum(dim=1), token, outside | True, numbers

model.generate, sampled_rollout: seeds left on the CPU
- seeds = seeds.to(vlm.device)
+ pass

model.fused, sampled_rollout: random numbers counted on the CPU
- torch.arange(rounds, device=seeds.device)
+ torch.arange(rounds)

model.decode, greedy_rollout: prefixes of other slots are read
- cell_of_row[row] = cell
+ cell_of_row[row] = 0

model.decode, greedy_rollout: rows that move leave their tail behind
- own = [self.seeds, self.tail,
+ own = [self.seeds,

model.schedule, greedy_rollout: a row that has left keeps its cell
- self.rows_of[owner.prefix].remove(row)
+ pass

model.generate, greedy_rollout: positions left on the CPU
- places.permute(2, 0, 1).to(device)
+ places.permute(2, 0, 1)

model.offload, offloaded_roles: buffers forgotten in offloading
- return [*trained, *model.buffers()]
+ return trained

model.vlm, offloaded_roles: offloaded to memory that is not pinned
- pinned=self.device.type == "cuda"
+ pinned=False

model.offload, offloaded_roles: a buffer for each offloaded tensor
- tensor.data = place.copy_(tensor.data)
+ tensor.data = torch.empty_like(place, pin_memory=pinned).copy_(tensor.data)

model.offload, offloaded_roles: a copy to the device that waits
- tensor.data.to(device, non_blocking=True)
+ tensor.data.to(device)

model.forward, sampled_rollout: features placed by looking for the image token
- .index_put(places,
+ .index_put((ids == model.config.image_token_id,),

model.logprobs, float32_update: a mask left on the CPU
- mask = packed_mask(batch.segment.to(device))
+ mask = packed_mask(batch.segment)

model.qwen2_5_vl, sampled_rollout: sizes of images asked for
- features.split(tokens.tolist())
+ features.split(tokens.to(device).tolist())

model.qwen2_5_vl, sampled_rollout: windows copied with a wait
- order = order.to(device, non_blocking=True)
+ order = order.to(device)

model.qwen3_vl, qwen3_sampled_rollout: an order of images made on the GPU
- lengths = grids[:, 1:].prod(dim=1)
+ lengths = grids.to(pixels.device)[:, 1:].prod(dim=1)

model.qwen3_vl, qwen3_float32_update: places in the table of positions made on the CPU
- entries.to(table.device, non_blocking=True)
+ entries

model.vision, float32_update: rotations made on the CPU
- places.to(device, non_blocking=True)
+ places

model.packing, float32_update: an order made on the CPU
- order = torch.arange(length, device=segment.device)
+ order = torch.arange(length)

model.logprobs, float32_update: a gradient made on the CPU
- grad_hidden = torch.empty_like(hidden)
+ grad_hidden = torch.empty(hidden.shape, dtype=hidden.dtype)

grpo, float32_update: advantages left on the CPU
- for completion in batch], device=logp.device
+ for completion in batch]

grpo, lora_update: a mask of tokens made on the CPU
- torch.ones_like(row, dtype=torch.bool)
+ torch.ones(len(row), dtype=torch.bool)

training.policy, moments_come_back: moments left on the CPU
- return whole.to(master.device)
+ return whole

model.decode, lora_rollout: a change that is left out
- return layer.merged() if type(layer) is LoRALinear else layer.weight
+ return layer.weight

model.decode, lora_rollout: merged where there is no room
- merge_change = 0 < changed <= room
+ merge_change = 0 < changed

model.decode, lora_rollout: copies that take a quarter of the cache
- room = cache_budget(vlm.device) // 5
+ room = cache_budget(vlm.device)

model.schedule, greedy_rollout: long rows are found at the look after
- last_step = (looks + 1) * self.check_every - 1
+ last_step = looks * self.check_every - 1

model.fused, greedy_rollout: short rows under the masks of long ones
- unwritten[-short:, :, :near]
+ unwritten[:short, :, :near]

model.lora, lora_export: a change merged on the other device
- change = change.to(self.weight.device)
+ change = change

model.lora, lora_export: all merged matrices on the GPU at once
- layer.merged().cpu()
+ layer.merged()

model.lora, lora_update: a change that is skipped where it is 0
- return super().forward(x) + ALPHA *
+ return super().forward(x) + (ALPHA if self.lora_B.any() else 0) *
"""


def parsed(text):
    """{what: (case, module, old, new)}"""
    mistakes = {}
    for block in text.strip().split("\n\n"):
        title, old, new = block.split("\n")
        place, what = title.split(": ")
        module, case = place.split(", ")
        mistakes[what] = case, module, old.removeprefix("- "), new.removeprefix("+ ")
    return mistakes


MISTAKES = parsed(PLANTED)


# ---- In the other process ----------------------------------------------------------------------------------


def plant(module, old, new):
    """Loads a module of the project with a mistake in it; all others will import this one."""
    spec = importlib.util.find_spec(module)
    forget()  # what the search for it has imported
    source, made = (
        Path(spec.origin).read_text(encoding="utf-8"),
        importlib.util.module_from_spec(spec),
    )
    if source.count(old) != 1:
        raise LookupError(
            f"{module}.py has {old!r} {source.count(old)} times, not once: mend PLANTED"
        )
    sys.modules[module] = made
    exec(compile(source.replace(old, new), spec.origin, "exec"), vars(made))


def forget():
    """The project's modules are imported anew."""
    for module in [
        m for m, x in sys.modules.items() if is_of_the_project(getattr(x, "__file__", None))
    ]:
        del sys.modules[module]


def forked(name):
    """What a case, or the case of a mistake, has to say; "" if nothing."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        said = ""
        try:
            forget()
            if name in MISTAKES:
                plant(*MISTAKES[name][1:])
            CASES[MISTAKES[name][0] if name in MISTAKES else name]()
        except BaseException:
            said = traceback.format_exc()[-20_000:]
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read().decode()
    status = os.waitpid(child, 0)[1]
    return said or (f"died with status {status}" if status else "")


def is_of_the_project(file):
    return bool(file) and Path(file).is_relative_to(ROOT) and Path(file).parent.name != "tests"


def main():
    torch.set_num_threads(1)
    import loop  # noqa: F401  what it imports stays loaded in the forks

    tiny()
    for name in sys.argv[1:]:
        print(name, forked(name) or "ok", sep="\n", flush=True)
    for name in [] if sys.argv[1:] else [*CASES, *MISTAKES]:
        start = time.monotonic()
        print(
            "\n" + json.dumps([name, forked(name), round(time.monotonic() - start, 1)]), flush=True
        )


# ---- In pytest ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What each case and each mistake has to say."""
    if not hasattr(os, "fork"):
        pytest.skip("this system cannot fork")
    folder = {
        "PRETENDED_GPU_FOLDER": str(tmp_path_factory.mktemp("pretended")),
        "OMP_NUM_THREADS": "1",
    }
    folder["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # torch allows no new threads in a fork
    command = [sys.executable, str(Path(__file__).resolve())]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | folder)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(lines) == len(CASES) + len(MISTAKES), done.stderr[-3000:]
    return {name: words for name, words, _ in lines}


@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu_that_is_not_there(name, said):
    assert not said[name], said[name]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_seen(mistake, said):
    assert said[mistake], f"{MISTAKES[mistake][0]} does not see: {mistake}"
    assert "mend PLANTED" not in said[mistake], said[mistake]


if __name__ == "__main__":
    main()
