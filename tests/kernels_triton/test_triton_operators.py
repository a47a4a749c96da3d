"""The operators by their GPU registrations, as torch calls them: schemas, aliases, fake results, gradients.

Without a GPU the CPU's registration of each operator is replaced by CUDA's, whose kernels then run in the interpreter.
"""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from triton_checks import DEVICE, error

from e2e_fast import kernels
from e2e_fast.kernels.triton import _launch

N, D, F, V = 4, 6, 13, 17

OTHER_WAYS = {"linear_kl": "dual_combine"} | dict.fromkeys(
    ("encode_topk", "encode_batch_topk", "encode_filter"), "filter_gemm"
)
"""Of `_launch.VARIANTS`, those that are not chosen."""

MODULES = ("adam", "autoencode", "decode", "encode", "filter_gemm", "linear_kl", "linear_kl_dual")
"""Where kernels are launched by operators."""


def registered() -> dict[str, Any]:
    """The operators that have kernels of their own for CPU and for CUDA."""
    modules = [importlib.import_module(f"e2e_fast.kernels.{m}") for m in ("adam", "code_backward", "decode", "encode")]
    modules.append(importlib.import_module("e2e_fast.kernels.linear_kl"))
    made = [value for module in modules for value in vars(module).values()]
    found = [op for op in made if isinstance(op, torch._library.custom_ops.CustomOpDef)]
    return {op._qualname: op for op in found if {"cpu", "cuda"} <= op._backend_fns.keys()}


def take_gpu_route(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        for op in registered().values():
            monkeypatch.setitem(op._backend_fns, "cpu", op._backend_fns["cuda"])


def tensors(dtype: torch.dtype = torch.float64, device: str = DEVICE, D: int = D, F: int = F) -> dict[str, Any]:
    """Inputs of all operators; parameters and hidden states ask for gradients."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()

    made: dict[str, Any] = {
        "x": leaf(N, D),
        "W_enc": leaf(F, D),
        "b_enc": leaf(F),
        "W_dec": leaf(F, D),
        "b_dec": leaf(D),
    }
    made |= {"teacher": leaf(N, D).detach(), "unembed": leaf(V, D).detach(), "bias": leaf(V).detach()}
    made |= {"students": leaf(3, N, D), "values": leaf(N, 5).detach(), "g": leaf(N, D).detach()}
    made["theta"] = (0.3 + leaf(F).detach().abs()).requires_grad_()
    made["indices"] = torch.stack([torch.randperm(F, generator=generator)[:5] for _ in range(N)]).int().to(device)
    made["band"] = (torch.rand(N, 5, generator=generator) < 0.3).to(device)
    made["norms"] = made["W_dec"].detach().double().norm(dim=-1).reciprocal().to(device)
    made["norms"] = made["norms"].to(torch.float64 if dtype == torch.float64 else torch.float32)
    made["number"] = torch.ones((), dtype=torch.float32, device=device)
    return made


def calls(t: dict[str, Any]) -> dict[str, tuple[Any, tuple]]:
    """Every operator with the arguments of one use."""
    op = torch.ops.e2e_fast
    x, W_enc, b_enc, W_dec, b_dec = (t[name] for name in ("x", "W_enc", "b_enc", "W_dec", "b_dec"))
    values, indices, g, norms = t["values"], t["indices"], t["g"], t["norms"]
    plain = {name: t[name].detach() for name in ("x", "W_enc", "W_dec")}
    decoder, encoder = (g, plain["W_dec"]), (plain["x"], plain["W_enc"])
    learned = values.clone().requires_grad_()
    adam = [plain["W_enc"].clone(), plain["W_dec"], torch.zeros_like(plain["W_enc"])]
    return {
        "encode_topk": (op.encode_topk, (x, W_enc, b_enc, 3)),
        "encode_relu": (op.encode_relu, (x, W_enc, b_enc, 5)),
        "encode_relu, fullest row": (op.encode_relu, (x, W_enc, None, -1)),
        "encode_batch_topk": (op.encode_batch_topk, (x, W_enc, b_enc, 3, 5)),
        "encode_batch_topk, fullest row": (op.encode_batch_topk, (x, W_enc, None, 3, -1)),
        "encode_jump_relu": (op.encode_jump_relu, (x, W_enc, b_enc, t["theta"], 0.5, 9)),
        "encode_jump_relu, fullest row": (op.encode_jump_relu, (x, W_enc, None, t["theta"], 0.5, -1)),
        "decode": (op.decode, (learned, indices, W_dec, b_dec, True)),
        "decode, band": (op.decode, (learned, indices, W_dec, b_dec, True, t["band"], norms)),
        "decode, frozen dictionary": (op.decode, (learned, indices, plain["W_dec"], None, False)),
        "autoencode, topk": (op.autoencode, (x, W_enc, b_enc, W_dec, b_dec, 3, -1, True)),
        "autoencode, relu": (op.autoencode, (x, W_enc, b_enc, W_dec, b_dec, 0, 9, True, False, norms)),
        "autoencode, batch topk": (op.autoencode, (plain["x"], W_enc, b_enc, W_dec, b_dec, 3, 9, True, True, norms)),
        "autoencode_jump": (op.autoencode_jump, (x, W_enc, b_enc, W_dec, b_dec, t["theta"], 0.5, 12, True, norms)),
        "autoencode_dense": (op.autoencode_dense, (x, W_enc, b_enc, W_dec, b_dec, True, None, 0.0, norms)),
        "autoencode_dense, jump": (
            op.autoencode_dense,
            (x, W_enc, b_enc, W_dec, b_dec, True, t["theta"], 0.5, norms),
        ),
        "code_backward": (
            op.code_backward,
            (values, indices, values, *decoder, *encoder, True, True, True, True, norms),
        ),
        "code_backward, decoder": (
            op.code_backward,
            (values, indices, None, *decoder, None, None, True, True, False, False),
        ),
        "code_backward, encoder": (
            op.code_backward,
            (values, indices, values, None, None, *encoder, False, False, True, False),
        ),
        "code_backward, dx": (
            op.code_backward,
            (values, indices, values, None, None, *encoder, False, False, False, True),
        ),
        "code_backward, dvalues": (
            op.code_backward,
            (values, indices, None, *decoder, None, None, True, False, False, False, norms),
        ),
        "code_backward, empty code": (
            op.code_backward,
            (values[:, :0], indices[:, :0], None, *decoder, *encoder, True, True, True, True, norms),
        ),
        "adam_step": (
            op.adam_step,
            (
                *adam, adam[2].clone(), t["number"], t["number"].clone(), 0.9, 0.999, 1e-8, 0.0,
                t["number"].clone(), norms.clone(), adam[2].clone(),
            ),
        ),
        "adam_step, plain": (
            op.adam_step,
            (
                *[a.clone() for a in adam], adam[2].clone(), t["number"], t["number"].clone(), 0.9, 0.999, 1e-8, 0.1,
                None, None, None,
            ),
        ),
        "linear_kl": (op.linear_kl, (x, t["teacher"], t["unembed"], t["bias"], 2.0, True)),
        "linear_kl, loss alone": (op.linear_kl, (plain["x"], t["teacher"], t["unembed"], None, None, False)),
        "linear_kl_shared": (op.linear_kl_shared, (t["students"], t["teacher"], t["unembed"], t["bias"], None, True)),
        "linear_kl_shared, loss alone": (
            op.linear_kl_shared,
            (t["students"].detach(), t["teacher"], t["unembed"], None, 2.0, False),
        ),
    }  # fmt: skip


UTILITIES = ("test_schema", "test_autograd_registration", "test_faketensor")

NAMES = list(calls(tensors()))


def outcome(op: Any, arguments: tuple) -> list[Tensor]:
    """Outputs (of Adam: what it wrote), then the gradients of their weighted sum for all inputs that ask for one."""
    results = op(*arguments)
    results = [a for a in arguments if isinstance(a, Tensor)] if results is None else results
    results = [results] if isinstance(results, Tensor) else list(results)
    wanted = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
    if wanted:
        weights = torch.Generator().manual_seed(1)
        total = sum(
            (r * torch.rand(r.shape, generator=weights, dtype=torch.float64).to(r)).sum()
            for r in results
            if r.requires_grad
        )
        results += [g for g in torch.autograd.grad(total, wanted, allow_unused=True) if g is not None]
    return [r.detach() for r in results]


@pytest.mark.parametrize("name", NAMES)
def test_registration_passes_opcheck(monkeypatch, name):
    """Among others: no output is an input, or shares memory with one or with another output."""
    take_gpu_route(monkeypatch)
    op, arguments = calls(tensors())[name]
    # Compilation sees the fakes and the formulas alone: tests/kernels/test_operators.py checks it.
    torch.library.opcheck(op.default, arguments, test_utils=UTILITIES)


@pytest.mark.parametrize("name", NAMES)
def test_gpu_and_cpu_agree_in_outputs_and_gradients(monkeypatch, name):
    ours = outcome(*calls(tensors(device="cpu"))[name])
    take_gpu_route(monkeypatch)
    theirs = outcome(*calls(tensors())[name])
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert error(a, b) < 3e-7 if name.startswith("adam") else error(a.double(), b.double()) < 1e-12


def strided(tensor: Tensor) -> Tensor:
    """The same numbers in another layout: matrices by columns, of vectors every second place."""
    other = tensor.detach().mT.contiguous().mT if tensor.dim() > 1 else tensor.detach().repeat_interleave(2)[::2]
    return other.requires_grad_(tensor.requires_grad)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("adam")])
def test_inputs_may_have_any_strides(monkeypatch, name):
    take_gpu_route(monkeypatch)
    op, arguments = calls(tensors())[name]
    expected = outcome(op, arguments)
    ours = outcome(op, tuple(strided(a) if isinstance(a, Tensor) else a for a in arguments))
    for a, b in zip(ours, expected, strict=True):
        assert error(a.double(), b.double()) < 1e-12


class ByOperators(TorchFunctionMode):
    """Methods that want a GPU for CUDA tensors, even for fake ones, as operators, which do not."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.__getitem__:
            return self.part(*args)
        if func is Tensor.__setitem__:
            return torch.ops.aten.copy_.default(self.part(*args[:2]), args[2])
        others = {Tensor.__invert__: torch.bitwise_not, Tensor.copy_: torch.ops.aten.copy_.default}
        return others.get(func, func)(*args, **(kwargs or {}))

    @staticmethod
    def part(tensor: Tensor, index: Any) -> Tensor:
        dim = 0
        for item in index if isinstance(index, tuple) else (index,):
            if item is None:
                tensor = tensor.unsqueeze(dim)
            elif item is Ellipsis:
                dim = tensor.dim() - 1
            elif isinstance(item, slice):
                tensor = torch.ops.aten.slice(tensor, dim, item.start, item.stop, item.step or 1)
            elif isinstance(item, int):
                tensor, dim = tensor.select(dim, item), dim - 1
            else:
                tensor = torch.ops.aten.index(tensor, [None] * dim + [item])
            dim += 1
        return tensor


def on_a_gpu_without_data(t: dict[str, Any], mode: FakeTensorMode) -> dict[str, Any]:
    """The same tensors as CUDA tensors that hold nothing: reading a number of theirs raises."""
    with mode:
        return {
            name: torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="cuda").requires_grad_(a.requires_grad)
            for name, a in t.items()
        }


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """The names of the kernels that would have been launched on sm_90, none of which is."""
    names: list[str] = []
    for name in MODULES:
        module = importlib.import_module(f"e2e_fast.kernels.triton.{name}")
        monkeypatch.setattr(module, "launch", lambda kernel, *_, **__: names.append(kernel.__name__))
    monkeypatch.setattr(_launch, "arch", lambda device: "sm_90")
    return names


WITHOUT_WAITING = [name for name in NAMES if "fullest row" not in name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", ["default", "other"])
@pytest.mark.parametrize("name", WITHOUT_WAITING)
def test_gpu_side_gives_what_its_fake_promises_and_reads_nothing_back(monkeypatch, launched, name, dtype, way):
    """Shapes, dtypes, devices and strides of results, in every variant; an .item() or the like raises."""
    if way == "other":
        for operator, ways in OTHER_WAYS.items():
            monkeypatch.setitem(_launch.VARIANTS, operator, {("any", "any", "any"): ways})
    mode = FakeTensorMode()
    t = on_a_gpu_without_data(tensors(dtype, "cpu", D=16, F=512), mode)
    with mode, ByOperators(), torch.no_grad():
        op, arguments = calls(t)[name]
        known = registered().get(op._qualified_op_name)
        promised = op(*arguments)
        ours = promised if known is None else known._backend_fns["cuda"](*arguments)
    promised, ours = ([] if r is None else [r] if isinstance(r, Tensor) else list(r) for r in (promised, ours))
    for expected, actual in zip(promised, ours, strict=True):
        assert actual.device.type == "cuda"
        assert (actual.shape, actual.dtype, actual.stride()) == (expected.shape, expected.dtype, expected.stride())
    assert known is None or launched


DIFFERENTIABLE = [name for name in WITHOUT_WAITING if not name.startswith(("code", "adam")) and "alone" not in name]


class Context:
    """What a backward formula is given by autograd, whose engine would start a thread for the missing GPU."""

    def __init__(self, arguments: tuple) -> None:
        self.needs_input_grad = [isinstance(a, Tensor) and a.requires_grad for a in arguments]

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors

    def set_materialize_grads(self, value: bool) -> None:
        pass

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        pass


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_of_gpu_tensors_have_their_inputs_form(name):
    mode = FakeTensorMode()
    t = on_a_gpu_without_data(tensors(torch.bfloat16, "cpu"), mode)
    with mode, ByOperators(), torch.no_grad():
        op, arguments = calls(t)[name]
        results = op(*arguments)
        definition = torch._library.custom_ops.OPDEFS[op._qualified_op_name]
        given = len(arguments)
        arguments = (*arguments, *(a.default_value for a in op.default._schema.arguments[given:]))
        context = Context(arguments)
        definition._setup_context_fn(context, arguments, results)
        arriving = [torch.empty_like(r) for r in ([results] if isinstance(results, Tensor) else results)]
        gradients = definition._backward_fn(context, *arriving)
    for a, gradient in zip(arguments, gradients, strict=True):
        if isinstance(a, Tensor) and a.requires_grad:
            assert (gradient.shape, gradient.dtype, gradient.device) == (a.shape, a.dtype, a.device)


@pytest.mark.parametrize("shared", [False, True])
def test_every_step_finds_the_padded_unembedding_of_the_first(monkeypatch, shared):
    take_gpu_route(monkeypatch)
    t = tensors()
    module = importlib.import_module("e2e_fast.kernels.triton.linear_kl")
    made = []

    def padded(weight: Tensor, dtype: torch.dtype, original: Any = module.padded_unembedding) -> Tensor:
        made.append(original(weight, dtype))
        return made[-1]

    monkeypatch.setattr(module, "padded_unembedding", padded)
    for _ in range(3):
        if shared:
            kernels.linear_kl_shared(t["students"], t["teacher"], t["unembed"]).sum().backward()
        else:
            kernels.linear_kl(t["x"], t["teacher"], t["unembed"]).backward()
    assert len(made) == 3
    assert all(copy is made[0] for copy in made)
