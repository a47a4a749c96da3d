"""The operators as torch sees them: registered fully, compilable, documented by examples that run."""

import doctest
import importlib
import subprocess
import sys

import pytest
import torch

from e2e_fast import kernels

N, D, F, V = 7, 5, 23, 31


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def queries_keys_values() -> list[torch.Tensor]:
    return [torch.randn(2, heads, 7, 5, requires_grad=True) for heads in (4, 2, 2)]


def operator_calls() -> dict[str, tuple]:
    torch.manual_seed(0)
    x, W_enc, b_enc, W_dec, b_dec = leaf(N, D), leaf(F, D), leaf(F), leaf(F, D), leaf(D)
    teacher, unembed, bias = (leaf(*s).detach() for s in ((N, D), (V, D), (V,)))
    op = torch.ops.e2e_fast
    values, indices, _ = (t.detach() for t in op.encode_topk(x, W_enc, b_enc, 3))
    plain = [t.detach() for t in (x, W_enc, W_dec)]
    theta = (0.3 * torch.rand(F, dtype=torch.float64)).requires_grad_()
    jump = tuple(t.detach() for t in op.encode_jump_relu(x, W_enc, b_enc, theta, 0.5, -1))
    norms = plain[2].norm(dim=-1).reciprocal()
    c = leaf(N, F).detach().relu_()
    adam = [t.clone() for t in (plain[1], plain[2], plain[1], plain[2].abs())]
    attended = [t.detach() for t in queries_keys_values()]
    attended = [*attended, 0.5, 3, 2.0, *op.attention(*attended, 0.5, 3, 2.0)]
    return {
        "encode_topk": (op.encode_topk, (x, W_enc, b_enc, 3)),
        "encode_relu[capacity]": (op.encode_relu, (x, W_enc, b_enc, 5)),
        "encode_relu[fullest row]": (op.encode_relu, (x, W_enc, None, -1)),
        "encode_batch_topk[capacity]": (op.encode_batch_topk, (x, W_enc, b_enc, 3, 5)),
        "encode_batch_topk[fullest row]": (op.encode_batch_topk, (x, W_enc, None, 3, -1)),
        "encode_jump_relu[capacity]": (op.encode_jump_relu, (x, W_enc, b_enc, theta, 0.5, 9)),
        "encode_jump_relu[fullest row]": (op.encode_jump_relu, (x, W_enc, None, theta, 0.5, -1)),
        "decode[band, norms]": (
            op.decode,
            (jump[0].clone().requires_grad_(), jump[1], W_dec, b_dec, True, jump[4], norms),
        ),
        "decode": (op.decode, (values.clone().requires_grad_(), indices, W_dec, b_dec, True)),
        "autoencode[topk]": (op.autoencode, (x, W_enc, b_enc, W_dec, b_dec, 3, -1, True)),
        "autoencode[relu]": (op.autoencode, (x, W_enc, b_enc, W_dec, b_dec, 0, -1, True)),
        "autoencode[batch topk]": (op.autoencode, (x, W_enc, b_enc, W_dec, b_dec, 3, -1, True, True, norms)),
        "autoencode_jump": (op.autoencode_jump, (x, W_enc, b_enc, W_dec, b_dec, theta, 0.5, -1, True)),
        "autoencode_dense": (op.autoencode_dense, (x, W_enc, b_enc, W_dec, b_dec, True, None, 0.0, None)),
        "autoencode_dense[jump]": (op.autoencode_dense, (x, W_enc, b_enc, W_dec, b_dec, True, theta, 0.5, norms)),
        "code_backward": (
            op.code_backward,
            (values, indices, values, plain[0], plain[2], plain[0], plain[1], True, True, True, True),
        ),
        "code_backward[norms]": (
            op.code_backward,
            (values, indices, None, plain[0], plain[2], None, None, True, True, False, False, norms),
        ),
        "autoencode_dense_backward": (
            op.autoencode_dense_backward,
            (c, None, *plain[:1], plain[2], *plain[:2], True, True, True, True, None, None, None, 0.0, None),
        ),
        "autoencode_dense_backward[jump]": (
            op.autoencode_dense_backward,
            (
                c,
                c,
                *plain[:1],
                plain[2],
                *plain[:2],
                True,
                True,
                True,
                True,
                theta.detach(),
                c > 0.5,
                c[:, 0],
                0.5,
                norms,
            ),
        ),
        "adam_step": (
            op.adam_step,
            (*adam, *torch.ones(2).double(), 0.9, 0.999, 1e-8, 0.0, norms[0].clone(), norms.clone(), plain[2].clone()),
        ),
        "attention": (op.attention, (*queries_keys_values(), 0.5, 3, 2.0)),
        "attention_backward": (op.attention_backward, (*attended, torch.randn_like(attended[6]))),
        "branch": (op.branch, (torch.randn(3, 5), None, None, 0.0, torch.randn(6, 5), None, "none", None, None, None)),
        "gelu": (op.gelu, (queries_keys_values()[0], "tanh")),
        "gelu_backward": (op.gelu_backward, (attended[0], attended[0], "none")),
        "linear_kl": (op.linear_kl, (x, teacher, unembed, bias, 2.0, True)),
        "linear_kl_shared": (op.linear_kl_shared, (leaf(3, N, D), teacher, unembed, bias, 2.0, True)),
        "linear_kl_shared[no gradient]": (
            op.linear_kl_shared,
            (leaf(2, N, D).detach(), teacher, unembed, None, None, False),
        ),
        "linear_kl[no gradient]": (op.linear_kl, (x.detach(), teacher, unembed, None, None, False)),
    }


@pytest.mark.parametrize("name", operator_calls())
def test_operator_passes_opcheck(name):
    op, args = operator_calls()[name]
    torch.library.opcheck(op.default, args)


@pytest.mark.parametrize("normalize", [True, False])
def test_training_step_compiles_without_graph_break(normalize):
    torch.manual_seed(0)
    x, W_enc, b_enc, W_dec, b_dec = leaf(N, D), leaf(F, D), leaf(F), leaf(F, D), leaf(D)
    unembed = leaf(V, D).detach()

    def step(x):
        x_hat, code = kernels.autoencode(x, W_enc, b_enc, W_dec, b_dec, k=3, normalize=normalize)
        return kernels.linear_kl(x_hat, x.detach(), unembed) + code.values.sum()

    parameters = (x, W_enc, b_enc, W_dec, b_dec)
    eager = torch.autograd.grad(step(x), parameters)
    compiled = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(x), parameters)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)


def test_second_derivatives_are_refused_not_wrong():
    student, teacher, unembed = leaf(N, D), leaf(N, D), leaf(V, D)
    (g,) = torch.autograd.grad(kernels.linear_kl(student, teacher, unembed), student, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(g.sum(), student)


def public_calls() -> dict[str, tuple]:
    x, W, b, h, step = torch.randn(N, D), torch.randn(F, D), torch.randn(F), torch.randn(V, D), torch.ones(())
    code, norms, c = kernels.encode_topk(x, W, b, 3), b.abs(), torch.randn(D)
    return {
        "encode_topk": (lambda *a: kernels.encode_topk(*a, k=3), (x, W, b)),
        "encode_relu": (kernels.encode_relu, (x, W, b)),
        "encode_batch_topk": (lambda *a: kernels.encode_batch_topk(*a, k=3), (x, W, b)),
        "encode_jump_relu": (kernels.encode_jump_relu, (x, W, b, b)),
        "decode": (lambda v, i, W, c, s: kernels.decode(code._replace(values=v, indices=i), W, c, inverse_norms=s),
                   (code.values, code.indices, W, c, norms)),
        "autoencode": (lambda *a: kernels.autoencode(*a[:5], threshold=a[5], inverse_norms=a[6]),
                       (x, W, b, W, c, b, norms)),
        "linear_kl": (kernels.linear_kl, (x, x, h, torch.randn(V))),
        "linear_kl_shared": (kernels.linear_kl_shared, (x[None], x, h, torch.randn(V))),
        "adam_step": (lambda *a: kernels.adam_step(*a[:6], clip=a[6], inverse_norms=a[7], shadow=a[8]),
                      (W.clone(), W, W.clone(), W.abs(), step, step, step, norms, W.clone())),
    }  # fmt: skip


@pytest.mark.parametrize("name", public_calls())
def test_tensors_on_two_devices_are_refused_by_name(name):
    call, arguments = public_calls()[name]
    call(*arguments)
    for i in range(len(arguments)):
        moved = [a.to("meta") if i == j else a for j, a in enumerate(arguments)]
        with pytest.raises(ValueError, match=r"must be on .*'s device (cpu|meta), got (cpu|meta)"):
            call(*moved)


MODULES = [
    "adam",
    "attention",
    "autoencode",
    "branch",
    "code_backward",
    "decode",
    "density",
    "encode",
    "gelu",
    "linear_kl",
    "reference",
    "sparse_code",
]


@pytest.mark.parametrize("name", ["", *(f".{m}" for m in MODULES)])
def test_documented_examples_run(name):
    module = importlib.import_module(f"e2e_fast.kernels{name}")
    torch.manual_seed(0)
    assert doctest.testmod(module).failed == 0


def test_importing_kernels_loads_no_heavy_package():
    code = (
        "import sys, e2e_fast.kernels; "
        "print([m for m in ('triton', 'transformers', 'transformer_lens', 'wandb', 'datasets', 'matplotlib') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
