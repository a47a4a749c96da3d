"""decode and the one-pass backward: values, gradients, and what must be exactly zero."""

import pytest
import torch
from tolerance import assert_as_accurate

from e2e_fast import kernels
from e2e_fast.kernels import SparseCode, reference

SHAPES = [(1, 1, 2, 1), (5, 1, 3, 7), (7, 9, 33, 20), (40, 32, 768, 300), (64, 3, 50, 2000)]


def random_code(N: int, K: int, F: int, dtype=torch.float32) -> SparseCode:
    """Distinct features per row, some slots unused, indices in no order."""
    indices = torch.rand(N, F).argsort(-1)[:, :K].int()
    values = torch.where(torch.rand(N, K) < 0.8, torch.rand(N, K) + 0.1, 0)
    return SparseCode(values.to(dtype), torch.where(values > 0, indices, 0), (values > 0).sum(-1).int())


def weights(F: int, D: int, dtype=torch.float32):
    return (torch.randn(F, D) * torch.logspace(-2, 2, F)[:, None]).to(dtype), torch.randn(D).to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decode_and_its_gradients_match_float64(route, shape, normalize, dtype):
    N, K, D, F = shape
    K = min(K, F)
    code, (W, b) = random_code(N, K, F, dtype), weights(F, D, dtype)
    upstream = torch.randn(N, D)

    def run(module, dtype):
        leaves = [t.to(dtype).detach().requires_grad_() for t in (code.values, W, b)]
        y = module.decode(code._replace(values=leaves[0]), *leaves[1:], normalize=normalize)
        return y.detach(), *torch.autograd.grad((y * upstream.to(dtype)).sum(), leaves)

    exact, naive, ours = run(reference, torch.float64), run(reference, dtype), run(kernels, dtype)
    assert ours[0].dtype == dtype
    for what, a, n, e in zip(("y", "dvalues", "dweight", "dbias"), ours, naive, exact, strict=True):
        assert_as_accurate(what, a, n, e)


def test_decoder_gradient_is_tangent_to_its_rows(route):
    code, (W, _) = random_code(30, 6, 40), weights(40, 24)
    W.requires_grad_()
    (dW,) = torch.autograd.grad(kernels.decode(code, W).square().sum(), W)
    W = W.detach()
    along = (dW * W).sum(-1).abs() / (dW.norm(dim=-1) * W.norm(dim=-1)).clamp_min(1e-30)
    assert float(along.max()) < 1e-5


def test_decode_ignores_the_length_of_the_rows(route):
    code, (W, b) = random_code(30, 6, 40), weights(40, 24)
    torch.testing.assert_close(kernels.decode(code, W, b), kernels.decode(code, 4 * W, b))


def test_rows_of_zero_length_are_divided_by_the_constant(route):
    code, (W, b) = random_code(8, 5, 12), weights(12, 7)
    W[3], W[4] = 0, 1e-14
    leaf, leaf_64 = W.clone().requires_grad_(), W.double().requires_grad_()
    y, exact = kernels.decode(code, leaf, b), reference.decode(code, leaf_64, b)
    torch.testing.assert_close(y.double(), exact.double(), rtol=1e-5, atol=1e-5)
    dW = torch.autograd.grad(y.sum(), leaf)[0]
    torch.testing.assert_close(dW.double(), torch.autograd.grad(exact.sum(), leaf_64)[0], rtol=1e-4, atol=1e-4)


def test_unused_slots_add_nothing_and_get_no_gradient(route):
    _, (W, b) = random_code(1, 1, 9), weights(9, 5)
    values = torch.tensor([[1.0, 0.0, -2.0], [0.0, 0.0, 0.0]], requires_grad=True)
    code = SparseCode(values, torch.tensor([[4, 5, 6], [0, 0, 0]]), torch.tensor([1, 0]))
    y = kernels.decode(code, W, b)
    torch.testing.assert_close(y[0], b + W[4] / W[4].norm())
    assert torch.equal(y[1], b)
    (dvalues,) = torch.autograd.grad(y.sum(), values)
    assert dvalues.flatten().nonzero().flatten().tolist() == [0]


def test_duplicate_features_in_a_row_add_up(route):
    _, (W, _) = random_code(1, 1, 9), weights(9, 5)
    twice = SparseCode(torch.tensor([[1.0, 2.0]]), torch.tensor([[3, 3]]), torch.tensor([2]))
    once = SparseCode(torch.tensor([[3.0]]), torch.tensor([[3]]), torch.tensor([1]))
    torch.testing.assert_close(kernels.decode(twice, W), kernels.decode(once, W))


def test_nan_activations_reach_the_output(route):
    code, (W, b) = random_code(4, 3, 9), weights(9, 5)
    code.values[2, 1] = torch.nan
    y = kernels.decode(code, W, b)
    assert y[2].isnan().all()
    assert y[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize(("N", "K"), [(0, 3), (4, 0), (0, 0)])
def test_empty_codes_decode_to_the_bias(route, N, K):
    W, b = (t.requires_grad_() for t in weights(9, 5))
    code = SparseCode(torch.zeros(N, K), torch.zeros(N, K, dtype=torch.int32), torch.zeros(N, dtype=torch.int32))
    y = kernels.decode(code, W, b)
    assert torch.equal(y, b.expand(N, 5))
    dW, db = torch.autograd.grad(y.sum(), (W, b))
    assert not dW.any()
    assert torch.equal(db, torch.full((5,), float(N)))


@pytest.mark.parametrize("bad", [-1, 9, 1 << 30, 1 << 32, -(1 << 33)])
def test_indices_outside_the_dictionary_are_refused(route, bad):
    code, (W, b) = random_code(4, 3, 9), weights(9, 5)
    if abs(bad) >= 1 << 31:
        code = code._replace(indices=code.indices.long())
    code.indices[1, 1] = bad
    with pytest.raises(ValueError, match=r"code.indices must lie in \[0, 9\)"):
        kernels.decode(code, W, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c._replace(values=c.values[:, 1:]), "must share a shape"),
        (lambda c: c._replace(indices=c.indices.float()), "indices must be int32 or int64"),
        (lambda c: c._replace(values=c.values.long()), "values must be floating point"),
    ],
)
def test_malformed_codes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        kernels.decode(change(random_code(4, 3, 9)), *weights(9, 5))


def test_code_backward_returns_only_what_is_needed(route):
    code, (W, _) = random_code(6, 3, 20), weights(20, 5)
    x, g = torch.randn(6, 5), torch.randn(6, 5)
    full = torch.ops.e2e_fast.code_backward(code.values, code.indices, None, g, W, x, W, True, True, True, True)
    none = torch.ops.e2e_fast.code_backward(code.values, code.indices, None, g, W, x, W, True, False, False, False)
    assert [t.numel() for t in none] == [0, 0, 0, code.values.numel(), 0]
    torch.testing.assert_close(none[3], full[3])
    for need_dx in (True, False):
        weights_alone = torch.ops.e2e_fast.code_backward(
            code.values, code.indices, None, g, W, x, W, True, True, True, need_dx, None, False
        )
        assert weights_alone[3].numel() == 0
        for i in (0, 1, 2, 4) if need_dx else (0, 1, 2):
            assert torch.equal(weights_alone[i], full[i])


def test_scattering_a_code_to_dense_and_back_changes_nothing():
    code = reference.encode_relu(torch.randn(6, 4), torch.randn(30, 4))
    back = SparseCode.from_dense(code.to_dense(30))
    for a, b in zip(code, back, strict=True):
        assert torch.equal(a, b)


def test_normalize_is_the_fourth_argument_of_decode_as_the_contract_says():
    code = kernels.SparseCode(torch.tensor([[2.0]]), torch.tensor([[1]], dtype=torch.int32), torch.tensor([1]))
    weight = torch.tensor([[1.0, 0.0], [0.0, 5.0]])
    for decode in (kernels.decode, kernels.reference.decode):
        assert decode(code, weight, None, False).tolist() == [[0.0, 10.0]]
        assert decode(code, weight, None, True).tolist() == [[0.0, 2.0]]
