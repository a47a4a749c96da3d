from typing import Any

import pytest
import torch
from triton_checks import DEVICE, FLOOR, error

from e2e_fast.kernels import SparseCode, reference
from e2e_fast.kernels.triton import _launch
from e2e_fast.kernels.triton import encode as module
from e2e_fast.kernels.triton.encode import (
    encode_batch_topk,
    encode_jump_relu,
    encode_relu,
    encode_topk,
    encode_topk_screened,
    kth_key,
    round_rows,
)
from e2e_fast.kernels.triton.groups import Scores

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


LENGTH = 80
POSITIONS = torch.arange(LENGTH)
ROWS = {
    "ties beyond the list": torch.ones(LENGTH),
    "ties at the threshold": torch.cat([torch.full((3,), 2.0), torch.ones(70), torch.full((7,), 3.0)]),
    "winners that share lanes": POSITIONS.eq(POSITIONS // 32 * 32 + 5) * 1.0 + POSITIONS / 1e3,
    "ascending": POSITIONS + 1.0,
    "descending": LENGTH - POSITIONS,
    "all zero": torch.zeros(LENGTH),
    "all negative": -torch.ones(LENGTH),
    "two positive": torch.cat([-torch.ones(60), torch.tensor([0.5, 0.25]), -torch.ones(18)]),
    "minus infinity": torch.full((LENGTH,), -torch.inf).index_fill(0, torch.tensor([17, 70]), 1.0),
    "infinity": POSITIONS.remainder(7).add(0.5).index_fill(0, torch.tensor([60]), torch.inf),
    "subnormal": POSITIONS * 1e-45,
    "negative zero": torch.full((LENGTH,), -0.0),
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
    z = torch.randint(1, 4, (2, 100), generator=generator).double()
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
    x, weight = torch.randn(7, 1, generator=generator), torch.randn(30, 1, generator=generator)
    inputs: Problem = (x.to(DEVICE), weight.to(DEVICE), None)
    asked = []
    spans = [(0, 3), (3, 4), (4, 7)]
    monkeypatch.setattr(module, "row_chunks", lambda *a: asked.append(a) or spans)
    assert_same_code(encode_topk(*inputs, 3), reference.encode_topk(*inputs, 3))
    for capacity in (-1, 12):
        slots = None if capacity < 0 else capacity
        assert_same_code(encode_relu(*inputs, capacity), reference.encode_relu(*inputs, slots))
    assert asked == [(7, 4 * 30, module.CHUNK_BYTES)] * 3


def test_a_budget_cuts_rows_in_near_equal_chunks():
    assert _launch.row_chunks(1000, bytes_per_row=4, budget=2048) == [(0, 512), (512, 1000)]
    assert _launch.row_chunks(130, bytes_per_row=400, budget=1) == [(0, 128), (128, 130)]
    assert _launch.row_chunks(0, bytes_per_row=400, budget=1) == []


def test_screening_gives_the_float32_code(generator):
    # Neighbours nearer to each other than bfloat16 can tell: 120 features around 5 directions.
    directions = torch.randn(5, 24, generator=generator)
    weight = directions.repeat(24, 1) + 1e-3 * torch.randn(120, 24, generator=generator)
    x, bias = torch.randn(6, 24, generator=generator), 0.1 * torch.randn(120, generator=generator)
    x, weight, bias = x.to(DEVICE), weight.to(DEVICE), bias.to(DEVICE)
    rounded = reference.encode_topk(x.bfloat16().float(), weight.bfloat16().float(), bias, 4)
    expected = reference.encode_topk(x.double(), weight.double(), bias.double(), 4)
    assert not torch.equal(rounded.indices, expected.indices)  # so the screen alone would not do
    values, indices, count = encode_topk_screened(x, weight, bias, 4)
    assert torch.equal(indices, expected.indices.int())
    assert torch.equal(count, expected.count.int())
    assert error(values, expected.values) < 1e-6


@pytest.mark.parametrize("name", ROWS)
def test_screening_of_hard_rows(name):
    z = ROWS[name].float()[None]
    inputs = (torch.ones(1, 1, device=DEVICE), z.t().contiguous().to(DEVICE), None)
    assert_same_code(encode_topk_screened(*inputs, 3), reference.encode_topk(*inputs, 3))


def test_screening_settles_rows_with_too_many_candidates(generator):
    x, weight = torch.randn(3, 8, generator=generator), torch.randn(1, 8, generator=generator).repeat(100, 1)
    weight[::7] += 1e-4
    x, weight = x.to(DEVICE), weight.to(DEVICE)
    values, indices, count = encode_topk_screened(x, weight, None, 5)
    expected = reference.encode_topk(x, weight, None, 5)
    assert torch.equal(count, expected.count.int())
    assert error(values, expected.values) < 1e-6
    # Equal scores: which of them comes first depends on the last bit of a sum, but each score must be its feature's.
    z = x @ weight.T
    assert error(torch.where(values > 0, z.gather(1, indices.long()), 0), values) < 1e-6


def test_screened_candidates_that_turn_out_negative_are_unused():
    # The rounded product is 0, so its upper bound is positive; the float32 score is not.
    weight = torch.tensor([[1.0, -1.0], [-2.0, 1.0], [1.0, -1.001]], device=DEVICE)
    x = torch.tensor([[1.0, 1.0], [1.0, 1.0005]], device=DEVICE)
    assert_same_code(encode_topk_screened(x, weight, None, 2), reference.encode_topk(x, weight, None, 2))
    assert encode_topk_screened(x, weight, None, 2)[2].tolist() == [0, 0]


def test_float32_inputs_are_screened_where_k_is_small(generator, monkeypatch):
    x, weight, bias = problem(generator, torch.float32)
    expected = encode_topk(x, weight, bias, 2)
    monkeypatch.setattr(module, "SCREENED_SHARE", 10)
    calls = []
    monkeypatch.setattr(module, "encode_topk_screened", lambda *a: calls.append(a) or encode_topk_screened(*a))
    values, indices, count = encode_topk(x, weight, bias, 2)
    assert len(calls) == 1
    assert torch.equal(indices, expected[1])
    assert torch.equal(count, expected[2])
    assert error(values, expected[0]) < 1e-6


def test_rounded_rows_come_with_their_norms_and_errors(generator):
    matrix = torch.randn(5, 37, generator=generator).to(DEVICE)
    rounded, norms, errors = round_rows(matrix)
    assert torch.equal(rounded, matrix.bfloat16())
    longest = torch.maximum(matrix.norm(dim=1), rounded.float().norm(dim=1))
    assert (norms >= longest).all()
    assert error(norms, longest) < 2e-4
    difference = (matrix - rounded.float()).norm(dim=1)
    assert (errors >= difference).all()
    assert error(errors, difference) < 2e-4


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
        key = kth_key(Scores(z.to(DEVICE), 50, bias.to(DEVICE)), k)
        assert (
            key.to(torch.int64 if dtype == torch.float64 else torch.int32).view(dtype).item() == expected[k - 1].item()
        )


def test_encoding_twice_agrees_to_the_bit(generator):
    x, weight, bias = problem(generator, torch.float32)
    for encode in (lambda: encode_topk(x, weight, bias, 9), lambda: encode_relu(x, weight, bias, 60)):
        for first, second in zip(encode(), encode(), strict=True):
            assert torch.equal(first, second)
