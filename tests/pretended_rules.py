"""The rules of `pretended_gpu`, as cases of their own."""

import torch
from pretended_cases import case, refused
from pretended_gpu import GPU


@case
def rules_at_any_time():
    with GPU() as gpu:
        x, here = torch.arange(6.0, device="cuda").view(2, 3), torch.ones(2, 3)
        assert x.is_cuda and x.device.type == "cuda" and not here.is_cuda
        assert refused(lambda: x + here) and refused(lambda: torch.cat([x, here]))
        assert refused(lambda: here[torch.tensor([0], device="cuda")]) and refused(x.pin_memory)
        assert refused(
            lambda: torch.rand(3, device="cuda", generator=torch.Generator().manual_seed(0))
        )
        assert refused(lambda: torch.bmm(x[None], x.T[None], out_dtype=torch.float32))
        assert (x * torch.tensor(2.0)).is_cuda, "a number may be on the CPU"
        assert not gpu.waits and x[:, 1].tolist() == [1, 4] and (x > 2).any() and len(x[x > 2]) == 3
        assert len(gpu.waits) == 3, "tolist, bool(), a boolean index"
        x.requires_grad_()
        (x.exp().sum() * 2).backward()
        assert x.grad.is_cuda and torch.equal(x.grad.cpu(), 2 * x.detach().cpu().exp())


@case
def rules_of_a_recording():
    breaking = {
        "item": lambda x: x.sum().item(),
        "tolist": lambda x: x.tolist(),
        "nonzero": lambda x: x.nonzero(),
        "boolean index": lambda x: x[x > 0],
        "random number": lambda x: torch.rand(2, device="cuda"),
        "to the CPU": lambda x: x.cpu(),
        "from a list": lambda x: x + torch.tensor([1.0, 2.0], device="cuda"),
        "index from the CPU": lambda x: x[torch.tensor([0])],
        "freeing memory": lambda x: torch.cuda.empty_cache(),
    }
    for what, work in breaking.items():
        with GPU():
            x = torch.zeros(2, device="cuda")

            def recording(work=work, x=x):
                with torch.cuda.graph(torch.cuda.CUDAGraph()):
                    work(x)

            assert refused(recording, RuntimeError), what
            assert refused(torch.cuda.empty_cache, RuntimeError), (
                "the allocator believes that it goes on"
            )
    with GPU():
        x, pinned, calls = torch.zeros(2, device="cuda"), torch.ones(2, pin_memory=True), []
        with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
            x += pinned.to("cuda", non_blocking=True) * (len(calls) + 1)
        old, x = x, torch.zeros(2, device="cuda")
        calls.append(1)
        before = old.tolist()
        graph.replay()
        assert old.tolist() == [before[0] + 1] * 2 and x.tolist() == [0, 0], (
            "old numbers, old address"
        )
        torch.cuda.empty_cache()
