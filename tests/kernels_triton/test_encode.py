from typing import Any

import pytest
import torch
from triton_checks import DEVICE, FLOOR, error

from e2e_fast.kernels import SparseCode, reference
from e2e_fast.kernels.triton import encode as module
from e2e_fast.kernels.triton.encode import (
    encode_batch_topk,
    encode_jump_relu,
    encode_relu,
    encode_topk,
    kth_key,
)

Problem = tuple[Any, Any, Any]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def problem(generator, dtype, N=4, D=6, F=101) -> Problem:
    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    return normal(N, D), normal(F, D), normal(F)


def scores(z) -> Problem:
    """Inputs whose scores are exactly z (N, F): x the identity's rows, weight zᵀ."""
    z = z.to(DEVICE)
    return torch.eye(z.shape[0], dtype=z.dtype, device=DEVICE), z.t().contiguous(), None


def assert_same_code(ours, expected: SparseCode):
    values, indices, count = ours
    assert torch.equal(values, expected.values)
    assert torch.equal(indices, expected.indices.to(indices.dtype))
    assert torch.equal(count, expected.count.to(count.dtype))
    assert indices.dtype == torch.int32
    assert count.dtype == torch.int32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 7, 32])
def test_topk_matches_reference(generator, dtype, k):
    x, weight, bias = problem(generator, dtype)
    values, indices, count = encode_topk(x, weight, bias, k)
    expected = reference.encode_topk(x.double(), weight.double(), bias.double(), k)
    assert values.dtype == dtype
    assert torch.equal(indices, expected.indices.int())
    assert torch.equal(count, expected.count.int())
    assert error(values, expected.values) <= FLOOR[dtype]


@pytest.mark.parametrize("k", [1, 5, 33, 101])
def test_topk_selects_exactly_what_a_stable_sort_does(generator, k):
    z = torch.randn(3, 101, generator=generator)
    assert_same_code(encode_topk(*scores(z), k), reference.encode_topk(*scores(z), k))


ROWS = {
    "ties beyond the list": torch.ones(200),
    "ties at the threshold": torch.cat([torch.full((3,), 2.0), torch.ones(190), torch.full((7,), 3.0)]),
    "winners that share lanes": torch.arange(200).eq(torch.arange(200) // 32 * 32 + 5) * 1.0 + torch.arange(200) / 1e3,
    "ascending": torch.arange(200) + 1.0,
    "descending": 200.0 - torch.arange(200),
    "all zero": torch.zeros(200),
    "all negative": -torch.ones(200),
    "two positive": torch.cat([-torch.ones(120), torch.tensor([0.5, 0.25]), -torch.ones(78)]),
    "minus infinity": torch.full((200,), -torch.inf).index_fill(0, torch.tensor([17, 150]), 1.0),
    "infinity": torch.arange(200).remainder(7).add(0.5).index_fill(0, torch.tensor([60]), torch.inf),
    "subnormal": torch.arange(200) * 1e-45,
    "negative zero": torch.full((200,), -0.0),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("k", [1, 9])
def test_topk_of_hard_rows(name, k):
    z = ROWS[name].float()[None]
    # x = 1 keeps -inf and infinity out of any product with 0.
    inputs = (torch.ones(1, 1, device=DEVICE), z.t().contiguous().to(DEVICE), None)
    ours = encode_topk(*inputs, k)
    assert_same_code(ours, reference.encode_topk(*inputs, k))
    assert torch.equal(ours[0].cpu(), torch.relu(torch.topk(z, k).values))


def test_a_list_that_overflows_is_settled_exactly_in_float64(generator):
    z = torch.randint(1, 4, (2, 300), generator=generator).double()
    assert_same_code(encode_topk(*scores(z), 11), reference.encode_topk(*scores(z), 11))


def test_nan_is_the_greatest_score_and_is_kept():
    z = torch.tensor([[1.0, torch.nan, 3.0, -1.0, torch.nan]])
    inputs = (torch.ones(1, 1, device=DEVICE), z.t().contiguous().to(DEVICE), None)
    values, indices, count = encode_topk(*inputs, 3)
    assert indices.tolist() == [[1, 4, 2]]
    assert values[0, :2].isnan().all()
    assert values[0, 2] == 3
    assert count.tolist() == [3]
    values, indices, count = encode_relu(*inputs, 5)
    assert indices.tolist() == [[0, 1, 2, 4, 0]]
    assert count.tolist() == [4]
    assert values[0].isnan().tolist() == [False, True, False, True, False]


def test_a_large_k_is_sorted(generator, monkeypatch):
    x, weight, bias = problem(generator, torch.float32)
    expected = encode_topk(x, weight, bias, 20)
    monkeypatch.setattr(module, "MOST_SELECTED", 19)
    for ours, theirs in zip(encode_topk(x, weight, bias, 20), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_chunks_of_rows_give_the_same_code_as_one(generator, monkeypatch):
    x, weight = torch.randn(130, 1, generator=generator), torch.randn(30, 1, generator=generator)
    inputs: Problem = (x.to(DEVICE), weight.to(DEVICE), None)
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    assert_same_code(encode_topk(*inputs, 3), reference.encode_topk(*inputs, 3))
    assert_same_code(encode_relu(*inputs, 12), reference.encode_relu(*inputs, 12))


@pytest.mark.parametrize("encode", [encode_topk, encode_relu])
def test_no_tokens_give_an_empty_code(generator, encode):
    x, weight, bias = problem(generator, torch.float32, N=0)
    values, indices, count = encode(x, weight, bias, 4)
    assert values.shape == indices.shape == (0, 4)
    assert count.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("capacity", [-1, 0, 30, 101, 500])
def test_relu_matches_reference(generator, dtype, capacity):
    x, weight, bias = problem(generator, dtype)
    values, indices, count = encode_relu(x, weight, bias, capacity)
    wide = (x.double(), weight.double(), bias.double())
    expected = reference.encode_relu(*wide, None if capacity < 0 else capacity)
    assert values.dtype == dtype
    assert torch.equal(indices, expected.indices.int())
    assert torch.equal(count, expected.count.int())
    assert error(values, expected.values) <= FLOOR[dtype]


def test_relu_without_bias_and_with_a_full_first_block():
    z = torch.cat([torch.ones(1, 40), -torch.ones(1, 60)], 1)
    assert_same_code(encode_relu(*scores(z), 50), reference.encode_relu(*scores(z), 50))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_jump_relu_keeps_what_exceeds_its_features_threshold(generator, dtype):
    x, weight, bias = problem(generator, dtype)
    threshold = torch.randn(101, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
    values, indices, count = encode_jump_relu(x, weight, bias, threshold, 101)
    z = x.double() @ weight.double().T + bias.double()
    expected = SparseCode.from_dense(torch.where((z > threshold.double()) & (z > 0), z, 0), 101)
    assert torch.equal(indices, expected.indices.int())
    assert torch.equal(count, expected.count.int())
    assert error(values, expected.values) <= FLOOR[dtype]


def test_jump_relu_drops_a_score_equal_to_its_threshold():
    z = torch.tensor([[1.0, 1.0, 1.0]])
    threshold = torch.tensor([0.5, 1.0, -2.0], device=DEVICE)
    assert encode_jump_relu(*scores(z), threshold, 3)[1].tolist() == [[0, 2, 0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("k", [1, 6])
def test_batch_topk_keeps_the_largest_of_the_batch(generator, dtype, k):
    z = torch.randn(5, 70, generator=generator, dtype=dtype)
    (values, indices, count), tau = encode_batch_topk(*scores(z), k, -1)
    expected_tau = z.flatten().topk(5 * k).values[-1]
    assert tau.item() == expected_tau.item()
    expected = SparseCode.from_dense(torch.where(z >= expected_tau, z, 0).to(DEVICE))
    assert_same_code((values, indices, count), expected)
    assert count.sum() == 5 * k


def test_batch_topk_keeps_every_tie_and_never_what_is_not_positive():
    z = torch.tensor([[3.0, 1.0, 1.0, -1.0], [1.0, -2.0, 0.0, 0.0]])
    (_, _, count), tau = encode_batch_topk(*scores(z), 1, 4)
    assert (tau.item(), count.tolist()) == (1.0, [3, 1])
    (_, _, count), tau = encode_batch_topk(*scores(z), 4, 4)
    assert (tau.item(), count.tolist()) == (0.0, [3, 1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_kth_key_spells_the_kth_largest_of_the_matrix(generator, dtype):
    z = torch.randn(4, 50, generator=generator, dtype=dtype)
    bias = torch.randn(50, generator=generator, dtype=dtype)
    expected = (z + bias).flatten().sort(descending=True).values
    for k in (1, 2, 37, 90):
        key = kth_key(z.to(DEVICE), bias.to(DEVICE), k)
        assert (
            key.to(torch.int64 if dtype == torch.float64 else torch.int32).view(dtype).item() == expected[k - 1].item()
        )


def test_encoding_twice_agrees_to_the_bit(generator):
    x, weight, bias = problem(generator, torch.float32)
    for encode in (lambda: encode_topk(x, weight, bias, 9), lambda: encode_relu(x, weight, bias, 60)):
        for first, second in zip(encode(), encode(), strict=True):
            assert torch.equal(first, second)
