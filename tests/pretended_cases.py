"""What must hold on a GPU: rollouts, updates and whole runs on `pretended_gpu`, and that module's own rules.

Each case runs in a process of its own, with the project's modules freshly imported (see
test_pretended_gpu.py): hence the imports inside the functions.
"""

import functools
import json
import os
import tempfile
from argparse import Namespace
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest import mock

import torch
from pretended_gpu import GPU, PROJECT, Refused, on_gpu, plain

ROOT = Path(PROJECT)
CASES = {}
SIZES = ["tiny"]  # of the models that `tiny` makes; its last entry counts


def of_qwen3(function):
    """The same case with a tiny Qwen3-VL."""

    @functools.wraps(function)
    def case_of_qwen3():
        SIZES.append("qwen3-tiny")
        function()

    return case_of_qwen3


def both_families(function):
    """A case that is tried with a model of each family."""
    CASES[f"qwen3_{function.__name__}"] = of_qwen3(function)
    return case(function)


def case(function):
    CASES[function.__name__] = function
    return function


# ---- What the cases share ----------------------------------------------------------------------------------


def tiny(dtype="float32", lively=False, rank=0):
    """A tiny random model on the CPU. lively: many words end a completion, and it does not repeat itself."""
    from shapes import random_vlm

    from model.lora import add_lora

    vlm = random_vlm(SIZES[-1], "cpu", dtype)
    rng = torch.Generator().manual_seed(1)
    if rank:
        add_lora(vlm.model, rank)
        for name, p in vlm.model.named_parameters():
            if name.endswith("lora_B"):
                p.data += 0.05 * torch.randn(p.shape, generator=rng)
    if lively:
        vlm.end_ids = [vlm.end_ids[0], *range(3, 500, 11)]
        for p in vlm.model.parameters():
            p.data += (0.12 * torch.randn(p.shape, generator=rng)).to(p.dtype)
    return vlm


def lent(vlm):
    """Its copy on the GPU."""
    twin = vlm.copy()
    twin.model.to("cuda")
    twin.device, twin.fallbacks = twin.model.device, type(vlm.fallbacks)()
    return twin


def prompts_of(vlm, count):
    from shapes import random_prompt

    prompts = [random_prompt(vlm, 50 + 7 * i, i) for i in range(count)]
    # Two more questions about the first image, and one more about the second.
    for prompt, cut in ((prompts[0], 0), (prompts[0], 3), (prompts[1], 1)):
        end = len(prompt) - cut
        ids = torch.cat([prompt.ids[: end - 3], prompt.ids[end - 3 : end] - 1])
        positions = prompt.positions[:, :end]
        prompts.append(type(prompt)(ids, positions, prompt.images, prompt.places))
    return prompts


def small_buckets():
    """Several graphs, rows that leave and prompts that wait, although all is tiny."""
    from model import generate, schedule

    schedule.BUCKETS["cuda"], schedule.CHECK_EVERY["cuda"] = (4, 1, 2, 2, 16, 8), 4
    schedule.CELLS["cuda"], schedule.NEAR["cuda"] = 3, 16

    def limits(vlm, prefixes, prefix_tokens, own_tokens, n):
        cells = min(3, n * max(prefixes))
        return schedule.Limits(2 * n, 3, cells, prefix_tokens, own_tokens)

    generate.limits_in_memory = limits


def scratch():
    """An empty folder, which pytest removes some day."""
    return tempfile.mkdtemp(dir=os.environ.get("PRETENDED_GPU_FOLDER"))


def tensors_of(vlm):
    return [*vlm.model.parameters(), *vlm.model.buffers()]


# ---- The rules ---------------------------------------------------------------------------------------------


def refused(work, error=Refused):
    try:
        work()
    except error:
        return True
    return False


# ---- Rollouts ----------------------------------------------------------------------------------------------


@both_families
def greedy_rollout():
    """Recorded and replayed, with refills: the CPU's tokens."""
    from model.decode import make_products
    from model.generate import generate

    vlm, prompts = tiny(lively=True), prompts_of(tiny(), 8)
    want = generate(vlm, prompts, 2, 24, temperature=0.0)
    assert len({len(ids) for group in want for ids in group}) > 2, "they end at different times"
    small_buckets()
    with GPU() as gpu:
        twin = lent(vlm)
        got = generate(twin, prompts, 2, 24, temperature=0.0)
        torch.cuda.empty_cache()
    assert got == want
    assert gpu.recordings > 2 and gpu.replays > 20 and gpu.stream == "main"
    pieces = "embed_last begin add_norm rotate_and_write attend swiglu"
    assert gpu.compiled.keys() == set(pieces.split()) and twin.fallbacks.compile
    for free in (1 << 32, 1 << 16):  # projections are merged where there is room
        with GPU(free=free):
            products = make_products(lent(vlm))[0].qkv
            assert ("matrix" in products.__code__.co_freevars) == (free == 1 << 32)


@both_families
def lora_rollout():
    """Merged where copies are small beside the cache, and not: the CPU's tokens."""
    from model.decode import make_products
    from model.generate import generate
    from model.lora import text_linears

    vlm, prompts = tiny(lively=True, rank=4), prompts_of(tiny(), 4)
    want = generate(vlm, prompts, 2, 24, temperature=0.0)
    small_buckets()
    for free in (1 << 32, 1 << 12):
        with GPU(free=free) as gpu:
            twin = lent(vlm)
            products = make_products(twin)[0]
            is_merged = hasattr(products.down, "keywords")
            assert is_merged == (free == 1 << 32)
            assert ("matrix" in products.gate_up.__code__.co_freevars) == is_merged
            assert generate(twin, prompts, 2, 24, temperature=0.0) == want
        assert gpu.replays > 20
    changed = sum(layer.weight.nbytes for _, layer in text_linears(vlm.model))
    for times, merges in ((8, False), (16, True)):  # a quarter, an eighth of the cache
        with GPU(free=times * changed):
            assert hasattr(make_products(lent(vlm))[0].down, "keywords") == merges


@both_families
def sampled_rollout():
    """bfloat16, top-p and top-k: the same recorded or not; who waits for the device is known."""
    from model.generate import generate

    vlm, prompts = tiny("bfloat16", lively=True), prompts_of(tiny(), 3)
    small_buckets()
    for top_p, top_k in ((0.9, 0), (1.0, 5)):
        with GPU() as gpu:
            twin, results = lent(vlm), []
            for twin.fallbacks.graphs in (True, False):
                settings = dict(
                    top_p=top_p, top_k=top_k, generator=torch.Generator("cuda").manual_seed(0)
                )
                results.append(generate(twin, prompts, 2, 10, **settings))
            generate(twin, prompts, 2, 3, top_p=top_p, generator=torch.Generator().manual_seed(0))
        assert results[0] == results[1] and gpu.recordings and gpu.replays
        assert set(gpu.waits) <= {"find_finished", "leave"}, set(gpu.waits)
        # A copy that is not "goes on" waits, too: where prompts come in and rows leave, and nowhere else.
        waiting = {who for how, who in gpu.copies if how.endswith("waits")} - {"generate"}
        prefilling = {"image_features", "encode", "embed", "pad", "first_logits", "prefill_tails"}
        may = {"__init__", "open", "point", "_move", "leave", "a test", *prefilling}
        assert waiting <= may, waiting - may


@case
def bfloat16_logits():
    """In float32 from the product on: in sampling, in log-probabilities and in their gradient."""
    from model.fused import float_logits
    from model.logprobs import token_logprobs

    rng = torch.Generator().manual_seed(0)
    h, weight = (torch.randn(n, 64, generator=rng).bfloat16() for n in (5, 300))
    weight = weight * 2
    targets = torch.arange(5)
    exact = h.double().requires_grad_()
    want = (exact @ weight.double().T).log_softmax(1)[range(5), targets]
    want.sum().backward()
    with GPU():
        there, targets = h.to("cuda").requires_grad_(), targets.to("cuda")
        arguments = h.to("cuda"), weight.to("cuda")
        out = torch.empty(5, 300, device="cuda")
        float_logits(*arguments, out=out)
        for logits in (float_logits(*arguments), out):
            assert plain(logits).dtype == torch.float32
            assert (plain(logits) - h.double() @ weight.double().T).abs().max() < 1e-3
        got = token_logprobs(there, weight.to("cuda"), targets, 1.0)
        got.sum().backward()
        assert (plain(got) - want).abs().max() < 1e-3
        assert (plain(there.grad) - exact.grad).norm() < 0.01 * exact.grad.norm()


def goes_on_without(vlm, prompts, sentence, **broken):
    """Greedy rollouts of three roles on a GPU that lacks something: the CPU's tokens, and one sentence."""
    from model.generate import generate

    want, said = generate(vlm, prompts, 2, 12, temperature=0.0), StringIO()
    with GPU(**broken) as gpu, redirect_stderr(said):
        twin = lent(vlm)
        for role in (twin, twin, twin.copy()):
            assert generate(role, prompts, 2, 12, temperature=0.0) == want
        generate(twin, prompts, 2, 12)
        torch.cuda.empty_cache()
    assert said.getvalue().count(sentence) == 1 and gpu.stream == "main"
    return gpu


@case
def a_capture_that_fails():
    """It is done eagerly, is not tried again, and memory can be freed after it."""
    gpu = goes_on_without(
        tiny(lively=True), prompts_of(tiny(), 3), "without a CUDA graph", breaks=True
    )
    assert gpu.recordings == 1 and gpu.replays == 0


@case
def a_compiler_that_fails():
    """It is said once and not tried again; the plain functions are recorded."""
    vlm, prompts = tiny(lively=True), prompts_of(tiny(), 3)
    gpu = goes_on_without(vlm, prompts, "without compiled kernels", compiles=False)
    assert gpu.recordings and gpu.replays and not gpu.compiled


@case
def nucleus():
    """A fixed number of rows draws again, and what comes is the nucleus's distribution."""
    from scipy.stats import chisquare

    from model.sampling import _rows_outside, sample

    probs = torch.tensor([0.4, 0.25, 0.0, 0.15, 0.1, 0.06, 0.04])
    for top_p, kept in ((0.85, [0, 1, 3, 4]), (0.7, [0, 1, 3]), (0.99, [0, 1, 3, 4, 5, 6])):
        with GPU() as gpu:
            logits = probs.log().expand(64, -1).to("cuda")
            uniform = lambda rounds: torch.rand(rounds, 64, 1, device="cuda")  # noqa: E731
            draws = [sample(logits, 1.0, top_p, 0, uniform).cpu() for _ in range(150)]
        assert not gpu.waits and 0 < _rows_outside(64, top_p) <= 64
        counts, want = torch.cat(draws).bincount(minlength=7), probs[kept].double()
        assert counts[kept].sum() == counts.sum() == 64 * 150, "nothing outside the nucleus"
        assert (
            chisquare(counts[kept].tolist(), (counts.sum() * want / want.sum()).tolist()).pvalue
            > 1e-4
        )


@both_families
def out_of_memory_in_a_rollout():
    """It begins again, smaller: before, during and after a recording."""
    from model.generate import generate

    vlm, prompts = tiny(lively=True), prompts_of(tiny(), 4)
    want = generate(vlm, prompts, 2, 12, temperature=0.0)
    with GPU() as gpu:
        generate(lent(vlm), prompts, 2, 12, temperature=0.0)
    full = torch.OutOfMemoryError("pretended")
    with GPU(), mock.patch.object(torch.cuda, "graph", side_effect=full):
        twin = lent(vlm)
        assert refused(lambda: generate(twin, prompts, 2, 12), torch.OutOfMemoryError)
        assert twin.fallbacks.graphs and twin.fallbacks.batch_scale == 1 / 64, "each size was tried"
    for moment in (0.1, 0.4, 0.6, 0.9):
        with GPU() as again:
            twin, again.fails_at = lent(vlm), int(moment * gpu.done)
            assert generate(twin, prompts, 2, 12, temperature=0.0) == want
            assert (
                twin.fallbacks.batch_scale == 0.5
                and twin.fallbacks.graphs
                and again.stream == "main"
            )
            torch.cuda.empty_cache()


# ---- Roles and updates -------------------------------------------------------------------------------------


@both_families
def offloaded_roles():
    """Pinned, in one buffer, still tied; lent without a wait and given back as they were."""
    with GPU() as gpu:
        vlm = lent(tiny("bfloat16"))
        head, table = vlm.model.lm_head.weight, vlm.model.get_input_embeddings().weight
        assert head is table and all(map(on_gpu, tensors_of(vlm)))
        vlm.offload()
        (buffer,) = {plain(t).untyped_storage().data_ptr() for t in tensors_of(vlm)}
        assert buffer in gpu.pinned and not any(map(on_gpu, tensors_of(vlm)))
        gpu.copies.clear()
        vlm.offload()  # nothing to do
        with vlm.on_device():
            assert all(map(on_gpu, tensors_of(vlm)))
        assert {how for how, _ in gpu.copies} == {"to GPU pinned goes on"}
        assert {plain(t).untyped_storage().data_ptr() for t in tensors_of(vlm)} == {buffer}
        twin = vlm.copy()
        assert (
            twin.offloaded and twin.model.lm_head.weight is twin.model.get_input_embeddings().weight
        )
        twin.load_to_device()
        assert all(map(on_gpu, tensors_of(twin))) and vlm.model.lm_head.weight is head is table
        assert twin.model.lm_head.weight is twin.model.get_input_embeddings().weight


def updated(vlm, checkpointing):
    """Two updates against a parked reference: their metrics, and the trained weights."""
    from shapes import random_completions

    import grpo
    from training.policy import Trained

    vlm.offload()
    reference = vlm.copy()
    groups = [
        grpo.make_group(prompt, random_completions(vlm, 3, 9, i), [0.0, 1.0, 1.0])
        for i, prompt in enumerate(prompts_of(vlm, 3))
    ]
    policy = Trained(vlm, 1e-3, 1e-2, checkpointing=checkpointing)
    grpo.add_reference(groups, reference)
    assert reference.offloaded and not vlm.offloaded and not policy.sharded
    metrics = [grpo.update(policy, policy.optimizer, groups) for _ in range(2)]
    return metrics, {name: plain(w).detach().clone() for name, w in policy.weights().items()}


def same_updates(vlm, near, apart):
    start, (want, trained) = vlm.trained_weights(), updated(vlm.copy(), False)
    for checkpointing in (False, True):
        with GPU() as gpu:
            got, ours = updated(lent(vlm), checkpointing)
        for a, b in zip(want, got):
            assert not b["skipped"] and abs(a["loss"] - b["loss"]) < near, (a, b)
            assert abs(a["grad_norm"] / b["grad_norm"] - 1) < near, (a, b)
        assert ours.keys() == trained.keys()
        off, way = (
            [(x[name] - y[name]).norm() for name in ours]
            for x, y in ((ours, trained), (ours, start))
        )
        assert torch.stack(off).norm() < apart * torch.stack(way).norm()
        assert set(gpu.waits) <= {"grpo_loss", "update"}, set(gpu.waits)


@both_families
def float32_update():
    same_updates(tiny(), 1e-5, 0.01)


@both_families
def lora_update():
    """A and B in float32, the base in bfloat16."""
    same_updates(tiny("bfloat16", rank=4), 0.02, 0.2)


@case
def moments_come_back():
    """What a state has on the disk is on the CPU; a resumed run goes on as if it had not stopped."""
    from training.policy import Trained

    with GPU():
        policy = Trained(lent(tiny("bfloat16", rank=2)), 1e-3, 1e-2)

        def step(policy):
            for p in policy.parameters():
                p.grad = torch.ones_like(p)
            policy.optimizer.step()
            return {name: w.cpu() for name, w in policy.weights().items()}

        weights, moments = (
            step(policy),
            {name: m.cpu() for name, m in policy.optimizer_state().items()},
        )
        resumed = Trained(lent(tiny("bfloat16", rank=2)), 1e-3, 1e-2)
        resumed.load_weights(iter(weights.items()))
        resumed.load_optimizer_state(iter(moments.items()))
        a, b = step(policy), step(resumed)
        assert all(map(on_gpu, resumed.optimizer_state().values())) and all(
            torch.equal(a[n], b[n]) for n in a
        )


@case
def gpu_benchmark():
    """The parts of bench/gpu.py that need no FSDP2: beside times they find what they find on a CPU."""
    import gpu

    from model.schedule import CHECK_EVERY

    CHECK_EVERY["cuda"] = 4
    gpu.copy_bandwidth = lambda device: 1e9
    args = Namespace(size="tiny", dtype="float32", out=Path(scratch(), "none"))
    vars(args).update(prompt_tokens=60, group_size=2, new_tokens=9, prompts=3)
    parts = (gpu.attention, gpu.rollout, gpu.update, gpu.gap, gpu.lora, gpu.estimate)

    def found_on(device, make):
        args.device, gpu.random_vlm = device, make
        return {(part.__name__, name): value for part in parts for name, value in part(args)}

    want = found_on("cpu", lambda *_: tiny())
    card = dict(max_memory_allocated=lambda: 2, reset_peak_memory_stats=lambda: None)
    card["get_device_name"] = lambda: "NVIDIA L40S"
    with mock.patch.multiple(torch.cuda, **card), GPU() as there:
        got = found_on("cuda", lambda *_: lent(tiny()))
        # A look at which rows are finished comes at every fourth token, hence after the twelfth.
        assert gpu.counted(args).steps == 11
    for name in ("gradient's norm", "skipped", "T % 128"):
        for found in (("update", name), ("lora", f"update: {name}")):
            assert abs(got[found] - want[found]) < 1e-4, (found, got[found], want[found])
    assert max(want["gap", "largest gap"], got["gap", "largest gap"]) < 1e-4
    # Two rollouts, two with LoRA, and the gap's.
    assert there.replays == 5 * 11 and got["rollout", "a capture (s)"] > 0


@both_families
def out_of_memory_in_an_update():
    """In the reference, in the forward and in the backward pass: half the budget, and the same step."""
    vlm, places = tiny(), set()
    want, _ = updated(vlm.copy(), False)
    with GPU() as gpu:
        updated(lent(vlm), False)
    for moment in (0.2, 0.3, 0.4):
        with GPU() as again:
            twin, again.fails_at = lent(vlm), int(moment * gpu.done)
            got, _ = updated(twin, False)
            assert twin.fallbacks.batch_scale == 0.5
        places.add(again.failed)
        for a, b in zip(want, got):
            assert (
                abs(a["loss"] - b["loss"]) < 1e-5
                and abs(a["grad_norm"] / b["grad_norm"] - 1) < 1e-4
            )


@case
def lora_export():
    """A and B are parked in CPU memory, W is on the GPU; what is written is what the CPU would write."""
    from PIL import Image
    from safetensors.torch import load_file

    from model import lora
    from model.generate import generate
    from model.vlm import VLM

    folder, image = Path(scratch()), Image.new("RGB", (56, 56))

    def trained(device):
        vlm = VLM.load(ROOT / "toy", device, "bfloat16")
        lora.add_lora(vlm.model, 2)
        vlm.offload()
        for name, p in vlm.model.named_parameters():
            if name.endswith("lora_B"):
                p.data += 0.5
        generate(vlm, [vlm.prompt("How many?", image)], 1, 2)
        vlm.save(folder / device)
        lora.save_adapter(vlm.model, "toy", folder / device / "adapter")
        return vlm

    trained("cpu")
    with GPU():
        model = trained("cuda").model
        layer, merged = lora.text_linears(model)[0][1], lora.merged_weights(model)
        assert on_gpu(layer.weight) and not on_gpu(layer.lora_A)
        made = [merged[f"{name}.weight"] for name, _ in lora.text_linears(model)]
        assert not any(map(on_gpu, made)), "a GPU has no room for all of them"
    base = load_file(ROOT / "toy" / "model.safetensors")
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        here, there = (load_file(folder / device / name) for device in ("cpu", "cuda"))
        assert here.keys() == there.keys() and all(
            torch.equal(here[key], there[key]) for key in here
        )
        assert (
            any(
                not torch.equal(here[key], base[key].to(here[key].dtype))
                for key in here
                if key in base
            )
            or "adapter" in name
        )


# ---- Whole runs --------------------------------------------------------------------------------------------

FLAGS = "--device cuda --iterations 1 --questioner-steps 2 --reasoner-steps 1 --images-per-step 2"
FLAGS += " --candidates 2 --group-size 2 --answers 2 --max-new-tokens 18"
FLAGS += " --save-every 1 --tau-low 0 --tau-high 1 --lr 1e-3"


def whole_and_resumed(*flags):
    """Two runs in an empty folder, one stopped in the middle and resumed; gives both folders."""
    import loop
    from measure import watch
    from training import dry_run as preview
    from training import run

    watch.HELD_OUT_QUESTIONS, preview.SCENES, watch.PROBES = 1, 4, 1
    os.chdir(scratch())
    flags = [*FLAGS.split(), *flags]
    rules = loop.Rules(  # something is learnt, whatever is said
        question_reward=lambda voted, s: [float(i) for i in range(len(voted))],
        answer_reward=lambda answer, question: float(len(answer or "")),
    )
    rewarded = functools.partial(loop.visplay, rules=rules)
    log = run.Run.log

    def stop(self, *args):
        log(self, *args)
        self.stopping = True

    quiet = redirect_stdout(StringIO()), redirect_stderr(StringIO())
    with GPU() as gpu, quiet[0], quiet[1], mock.patch.object(loop, "visplay", rewarded):
        assert loop.main([*flags, "--name", "whole"]) == 0
        with mock.patch.object(run.Run, "log", stop):
            assert loop.main([*flags, "--name", "cut"]) == 1
        assert loop.main(["--resume", "runs/cut"]) == 0
    assert gpu.recordings and gpu.replays > 50
    whole, cut = Path("runs/whole").resolve(), Path("runs/cut").resolve()
    assert records(whole) == records(cut)
    assert {r["phase"] for r in records(whole)} >= {"questioner", "curation", "reasoner", "measure"}
    return whole, cut


def records(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines]


def same_file(whole, cut, name):
    return (whole / name).read_bytes() == (cut / name).read_bytes()


@case
def whole_run():
    whole, cut = whole_and_resumed("--dtype", "float32")
    for role in ("questioner", "reasoner"):
        assert same_file(whole, cut, f"{role}/model.safetensors")
