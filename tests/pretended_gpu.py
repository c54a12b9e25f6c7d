"""A GPU that is not there: tensors that say cuda:0 and hold true numbers, and a GPU's rules.

    with GPU() as gpu:
        ...  # whatever asks for the device "cuda" gets it

`OnGPU` is a tensor with its numbers in CPU memory. To torch's C++ it is on the device "lazy", which nobody
uses and for which autograd asks no driver; to Python it is on cuda:0. `GPU` sees every operation (ATen's, so
those of autograd as well), computes it on the CPU, and refuses what a GPU refuses:

    always            operands on both devices; random numbers for the GPU from a generator of the CPU;
                      pinning GPU memory; mm, bmm(out_dtype=...) of dtypes for which there is no kernel
    in a recording    waits for the device; copies to and from memory that is not pinned; random numbers;
                      freeing memory
    in a replay       no Python runs: the recorded operations are done again, with the numbers that they had,
                      on the tensors that they had; a step that changes from call to call goes wrong, as there
    compiling         where it is not the first call that compiles, or a new shape, but a recording
    after a recording that broke off: freeing memory fails until the allocator is told that it has ended

What torch.compile is asked for runs as it stands: compiling itself is tested on the CPU (test_fused.py).
It cannot tell how fast anything is, how much memory it takes, what CUDA's own kernels compute, or whether
two streams race; and tensors of FSDP2 (DTensor) do not run on it.
"""

import functools
import sys
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

TESTS = str(Path(__file__).resolve().parent)
PROJECT = str(Path(TESTS).parent)
CUDA, CPU, ALIAS = torch.device("cuda", 0), torch.device("cpu"), "lazy"

# The host needs a number, or a size that depends on numbers.
ASKING = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "bincount",
}
ASKING |= {"_unique2", "unique_dim", "unique_consecutive"}
RANDOM = {"rand", "randn", "randint", "randperm", "multinomial", "bernoulli", "native_dropout"}
RANDOM |= {"uniform_", "normal_", "exponential_", "random_", "bernoulli_"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
COPYING = {"_to_copy", "copy_"}


class Refused(RuntimeError):
    """What a GPU refuses."""


class OnGPU(torch.Tensor):
    """A tensor on the GPU; a parameter stays one when it is parked in CPU memory, which `at_home` says."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, numbers):
        shape = dict(
            strides=numbers.stride(), storage_offset=numbers.storage_offset(), dtype=numbers.dtype
        )
        return torch.Tensor._make_wrapper_subclass(cls, numbers.size(), **shape, device=ALIAS)

    def __init__(self, numbers):
        self.numbers, self.at_home = numbers, False

    def __repr__(self):
        return f"OnGPU({self.numbers}{', parked' if self.at_home else ''})"

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            twin = OnGPU(self.numbers.detach().clone())
            if isinstance(self, torch.nn.Parameter):
                twin = torch.nn.Parameter(twin, self.requires_grad)
            twin.at_home, memo[id(self)] = self.at_home, twin
        return memo[id(self)]

    device = property(lambda self: CPU if self.at_home else CUDA)
    is_cuda = property(lambda self: not self.at_home)

    @property
    def data(self):
        return self.numbers if self.at_home else OnGPU(self.numbers)

    @data.setter
    def data(self, new):
        assert new.shape == self.shape and new.dtype == self.dtype, (
            "torch would change it; here nobody does"
        )
        self.numbers, self.at_home = plain(new), not on_gpu(new)

    def clone(self):
        return self.__deepcopy__({}) if self.at_home else super().clone()

    def cpu(self):
        return self.to(CPU)

    def tolist(self):
        if not self.at_home:
            GPU.now.wait("tolist")
        return self.numbers.tolist()

    def new_tensor(self, data, **kwargs):
        return torch.tensor(data, **dict(dtype=self.dtype, device=self.device) | kwargs)

    def pin_memory(self, *_):
        raise Refused("only dense CPU tensors can be pinned")

    def data_ptr(self):
        return self.numbers.data_ptr()

    def untyped_storage(self):
        return self.numbers.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return GPU.now.__torch_dispatch__(func, types, args, kwargs)


def on_gpu(x) -> bool:
    return isinstance(x, OnGPU) and not x.at_home


def plain(x):
    """What the CPU computes with, in place of what the project has."""
    if isinstance(x, torch.device) and x.type in (CUDA.type, ALIAS):
        return CPU
    return x.numbers if isinstance(x, OnGPU) else x


def each(f, x):
    """The same nest of lists, tuples and dicts, with f done to what is in it."""
    kind = type(x)
    if kind is list or kind is tuple:
        return kind([each(f, part) for part in x])
    return {key: each(f, part) for key, part in x.items()} if kind is dict else f(x)


def tensors_in(x) -> list:
    """All tensors in such a nest."""
    if isinstance(x, torch.Tensor):
        return [x]
    parts = x.values() if type(x) is dict else x if type(x) in (list, tuple) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


class GPU(TorchDispatchMode):
    """free: bytes of memory that are said to be free. breaks: whether recordings break off; compiles: whether
    there is a compiler."""

    now: "GPU"

    def __init__(self, free: int = 1 << 32, breaks: bool = False, compiles: bool = True):
        super().__init__()
        self.free, self.breaks, self.compiles = free, breaks, compiles
        self.compiled: dict[str, int] = {}  # how often each function was compiled
        self.waits: list[str] = []  # the functions of the project that waited for a number,
        self.copies: list[
            tuple[str, str]
        ] = []  # and those that copied between the devices: (how, who)
        self.recordings = self.replays = self.done = 0
        self.fails_at = self.failed = (
            None  # memory runs out when so many operations are done; who did it
        )
        self.tape: list | None = None  # of the recording that goes on
        self.stream, self.underway = "main", False  # underway: what the allocator believes
        self.pinned: dict[int, torch.UntypedStorage] = {}

    def __enter__(self):
        GPU.now, self.undo = self, ExitStack()
        functions = dict(
            _lazy_init=lambda: None,
            is_available=lambda: True,
            device=lambda device: nullcontext(),
            set_device=lambda device: None,
            current_device=lambda: 0,
            synchronize=lambda device=None: None,
            current_stream=lambda device=None: self.stream,
            set_stream=lambda stream: setattr(self, "stream", stream),
            mem_get_info=lambda device=None: (self.free, 2 * self.free),
            memory_reserved=lambda device=None: 0,
            memory_allocated=lambda device=None: 0,
            get_device_properties=lambda device=None: SimpleNamespace(total_memory=2 * self.free),
            is_current_stream_capturing=lambda: self.tape is not None,
            empty_cache=self.empty_cache,
            graph_pool_handle=lambda: (0, 1),
            CUDAGraph=Graph,
            graph=self.graph,
        )
        patches = [mock.patch.object(torch.cuda, name, new) for name, new in functions.items()]
        patches += [mock.patch.object(torch, name, new) for name, new in constructors().items()]
        end = dict(_cuda_endAllocateToPool=lambda index, pool: setattr(self, "underway", False))
        patches += [
            mock.patch.object(torch._C, name, new, create=True) for name, new in end.items()
        ]
        capturing = SimpleNamespace(is_capturing=lambda: self.tape is not None)
        current = lambda device=None: capturing  # noqa: E731  torch 2.14's optimizers ask it
        patches += [mock.patch.object(torch.accelerator, "current_stream", current)]
        patches += [mock.patch.object(torch.Tensor, "to", moved)]
        patches += [mock.patch.object(torch, "compile", self.compile)]
        for patch in patches:
            self.undo.enter_context(patch)
        # `module.to("cuda")` keeps a parameter the same object, as it does on a true GPU; ties hold.
        torch.__future__.set_swap_module_params_on_conversion(True)
        self.undo.callback(torch.__future__.set_swap_module_params_on_conversion, False)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.undo.close()

    # ---- An operation ----------------------------------------------------------------------------------

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        tensors = tensors_in((args, kwargs))
        there, here = [x for x in tensors if on_gpu(x)], [x for x in tensors if not on_gpu(x)]
        device = kwargs.get("device")
        made_there = bool(there) if device is None else device.type in (CUDA.type, ALIAS)
        if there or made_there:
            self.check(func, name, args, kwargs, there, here, made_there)
            self.done += 1
            if self.done == self.fails_at:
                self.failed = caller()
                raise torch.OutOfMemoryError("CUDA out of memory (pretended)")
        args_, kwargs_ = each(plain, args), each(plain, kwargs)
        if kwargs_.pop("pin_memory", False):
            made = func(*args_, **kwargs_)
            self.pinned[made.untyped_storage().data_ptr()] = made.untyped_storage()
            return made
        if name == "_fused_sdp_choice":
            return 0  # the plain formula
        made = compute(func, args_, kwargs_)
        if self.tape is not None and (there or made_there) and not func.is_view:
            self.tape.append((func, args_, kwargs_, tensors_in(made)))
        if (written := written_argument(func)) is not None:
            return kwargs[written[1]] if written[1] in kwargs else args[written[0]]
        return (
            each(lambda x: OnGPU(x) if isinstance(x, torch.Tensor) else x, made)
            if made_there
            else made
        )

    def check(self, func, name, args, kwargs, there, here, made_there) -> None:
        """The rules."""
        recording = self.tape is not None
        if name in RANDOM and recording:
            raise Refused(f"{name}: a random number in a recording")
        if name in COPYING:
            target = made_there if name == "_to_copy" else on_gpu(args[0])
            source = args[0] if name == "_to_copy" else args[1]
            if target != on_gpu(source):
                host = source if target else args[0] if name == "copy_" else None
                self.copy(host, target, kwargs.get("non_blocking", len(args) > 2 and args[2]))
            return
        masks = (
            [x for x in tensors_in(args[1]) if x.dtype == torch.bool] if name in INDEXING else []
        )
        sizes = name == "repeat_interleave" and func._overloadname == "Tensor"
        if there and (name in ASKING or masks or (sizes and kwargs.get("output_size") is None)):
            self.wait(name)
        if name in INDEXING and on_gpu(args[0]):  # an index may come from the CPU, and is copied
            indices = [x for x in tensors_in(args[1]) if not on_gpu(x)]
            here = [x for x in here if all(x is not index for index in indices)]
            for index in indices:
                self.copy(index, True, False)
        if there and any(x.dim() for x in here):
            raise Refused(
                f"{name}: expected all tensors to be on the same device, found cuda:0 and cpu"
            )

    def copy(self, host, to_gpu: bool, non_blocking: bool) -> None:
        """host: the tensor on the CPU's side; None: it is about to be made."""
        pinned = host is not None and plain(host).untyped_storage().data_ptr() in self.pinned
        if self.tape is not None and not (pinned and non_blocking):
            raise Refused(
                "a copy between CPU and CUDA in a recording, and the CPU's memory is not pinned"
            )
        how = ["to GPU" if to_gpu else "to CPU", "pinned" if pinned else "pageable"]
        self.copies.append((" ".join([*how, "waits" if not non_blocking else "goes on"]), caller()))

    def wait(self, name: str) -> None:
        """The host waits until the GPU has done all it was told to."""
        if self.tape is not None:
            raise Refused(f"{name}: operation not permitted when stream is capturing")
        self.waits.append(caller())

    # ---- Recording ---------------------------------------------------------------------------------------

    @contextmanager
    def graph(self, graph, pool=None):
        """torch.cuda.graph. Of one that breaks off the stream stays current and the allocator in it."""
        self.empty_cache()
        self.recordings, self.underway, self.stream = self.recordings + 1, True, "recording"
        self.tape = graph.tape
        try:
            yield
            if self.breaks:
                raise RuntimeError(
                    "operation failed due to a previous error during capture (pretended)"
                )
        finally:
            self.tape = None
        self.underway, self.stream = False, "main"

    def compile(self, function, fullgraph: bool):
        """torch.compile: in the first call, and where a size is 1 that was not, or a dtype another."""
        kinds = set()

        def call(*args):
            kind = tuple((x.dtype, *(size == 1 for size in x.shape)) for x in tensors_in(args))
            if kind not in kinds:
                if self.tape is not None:
                    raise Refused(f"{function.__name__} is compiled in a recording")
                if not self.compiles:
                    raise RuntimeError("Cannot find a working triton installation (pretended)")
                self.compiled[function.__name__] = self.compiled.get(function.__name__, 0) + 1
            kinds.add(kind)
            return function(*args)

        return call

    def empty_cache(self) -> None:
        """torch.cuda.empty_cache."""
        if self.tape is not None or self.underway:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED (pretended)")


class Graph:
    """torch.cuda.CUDAGraph: the recorded operations, on the tensors themselves."""

    def __init__(self):
        self.tape = []

    def replay(self):
        GPU.now.replays += 1
        with torch.utils._python_dispatch._disable_current_modes():
            for func, args, kwargs, made in self.tape:
                for old, new in zip(made, tensors_in(compute(func, args, kwargs))):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def compute(func, args, kwargs):
    """The operation on the CPU."""
    aten = torch.ops.aten
    if func in (aten.bmm.dtype, aten.mm.dtype, aten.mm.dtype_out):
        (a, b, dtype), half = args, (torch.bfloat16, torch.float16)
        if a.dtype not in half or b.dtype != a.dtype or dtype not in (a.dtype, torch.float32):
            raise Refused(
                f"{func}: out_dtype must be the dtype of the inputs, or float32 for half ones"
            )
        product = torch.matmul(a.to(dtype), b.to(dtype))
        if "out" not in kwargs:
            return product
        out = kwargs["out"]
        if out.dtype != dtype or out.shape != product.shape:
            raise Refused(f"{func}: out must be {dtype}, {list(product.shape)}")
        return out.copy_(product)
    return func(*args, **kwargs)


@functools.cache
def written_argument(func) -> tuple[int, str] | None:
    """Place and name of the argument that an operation in place gives back."""
    returns = func._schema.returns
    if len(returns) == 1 and returns[0].alias_info is not None and returns[0].alias_info.is_write:
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                return place, argument.name
    return None


true_to = torch.Tensor.to


def moved(tensor, *args, **kwargs):
    """Tensor.to, which torch's C++ would not begin without a driver."""
    copy = kwargs.pop("copy", False)
    device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
    if device is None or (CUDA.type if device.type == ALIAS else device.type) == tensor.device.type:
        return true_to(tensor, dtype or tensor.dtype, copy=copy, memory_format=layout)
    kinds = dict(device=device, dtype=dtype or tensor.dtype, non_blocking=non_blocking)
    return torch.ops.aten._to_copy(tensor, **kinds)


def constructors() -> dict:
    """torch.tensor, torch.rand and torch.Generator as they are with a GPU."""
    true_tensor, true_rand, true_generator = torch.tensor, torch.rand, torch.Generator

    class Generator(true_generator):
        def __new__(cls, device="cpu"):
            return super().__new__(cls)

        def __init__(self, device="cpu"):
            self.place = torch.device(device)

        device = property(lambda self: self.place)

    def tensor(data, *, device=None, **kwargs):
        made = true_tensor(data, **kwargs)
        return made if device is None else made.to(device)

    def rand(*size, device=None, generator=None, **kwargs):
        if generator is not None and generator.device.type != torch.device(device or "cpu").type:
            raise Refused(f"a generator of {generator.device} for numbers on {device}")
        return true_rand(*size, device=device, generator=generator, **kwargs)

    return dict(tensor=tensor, rand=rand, Generator=Generator)


def caller() -> str:
    """The innermost function of the project on the stack."""
    frame = sys._getframe(2)
    while frame is not None:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        if path.startswith(PROJECT) and not path.startswith(TESTS) and not name.startswith("<"):
            return name
        frame = frame.f_back
    return "a test"
