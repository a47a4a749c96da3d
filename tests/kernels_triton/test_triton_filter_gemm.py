"""Encoders whose product writes only groups of features that may be kept: every activation, and screening."""

import pytest
import torch
from test_triton_encode import ROWS, assert_same_code
from test_triton_encode import problem as problem_of_any_width
from triton_checks import DEVICE, FLOOR, error

from e2e_fast.kernels import reference
from e2e_fast.kernels.triton import _launch, filter_gemm
from e2e_fast.kernels.triton import encode as module
from e2e_fast.kernels.triton.encode import encode_batch_topk, encode_relu, encode_topk, encode_topk_screened, round_rows
from e2e_fast.kernels.triton.jump_relu import encode_jump_relu

DTYPES = [torch.bfloat16, torch.float16]
OPERATORS = ("encode_topk", "encode_batch_topk", "encode_filter")


def problem(generator, dtype, D=16, **sizes):
    """D a multiple of 16, as this variant wants it."""
    return problem_of_any_width(generator, dtype, D=D, **sizes)


def double(*tensors):
    return [None if t is None else t.double() for t in tensors]


@pytest.fixture(autouse=True)
def chosen(monkeypatch) -> list:
    """The variant is switched on; the shape of each chunk it serves is listed."""
    served = []
    run = module.filtered_scores
    for operator in OPERATORS:
        monkeypatch.setitem(_launch.VARIANTS, operator, {("any", "any", "any"): "filter_gemm"})
    monkeypatch.setattr(module, "filtered_scores", lambda x, *a, **o: served.append(tuple(x.shape)) or run(x, *a, **o))
    return served


def one_row(z, dtype=torch.float16):
    """Inputs whose scores are z (F,) exactly, as far as the dtype holds them; x = 1 keeps infinities out of sums."""
    weight = torch.zeros(len(z), 16, dtype=dtype, device=DEVICE)
    weight[:, 0] = z
    return torch.ones(1, 16, dtype=dtype, device=DEVICE), weight, None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("N", "D", "F", "k", "bias"),
    [(1, 16, 40, 1, True), (4, 48, 301, 7, False), (17, 16, 70, 12, True), (3, 32, 31, 31, True)],
)
def test_topk_matches_reference(generator, chosen, dtype, N, D, F, k, bias):
    x, weight, b = problem(generator, dtype, N=N, D=D, F=F)
    b = b if bias else None
    values, indices, count = encode_topk(x, weight, b, k)
    expected = reference.encode_topk(*double(x, weight, b), k)
    assert chosen == [(N, D)]
    assert values.dtype == dtype
    assert torch.equal(indices, expected.indices.int())
    assert torch.equal(count, expected.count.int())
    assert error(values, expected.values) <= FLOOR[dtype]


@pytest.mark.parametrize("name", ROWS)
def test_topk_of_hard_rows(chosen, name):
    z = ROWS[name].repeat(2).float()
    inputs = one_row(z)
    ours = encode_topk(*inputs, 9)
    assert_same_code(ours, reference.encode_topk(*inputs, 9))
    assert torch.equal(ours[0].cpu(), torch.relu(torch.topk(inputs[1][None, :, 0].cpu(), 9).values))
    assert chosen


@pytest.mark.parametrize("name", ROWS)
def test_relu_of_hard_rows(chosen, name):
    inputs = one_row(ROWS[name].repeat(2).float())
    for capacity in (-1, 7):
        expected = reference.encode_relu(*inputs, None if capacity < 0 else capacity)
        assert_same_code(encode_relu(*inputs, capacity), expected)
    assert len(chosen) == 2


def test_integers_with_many_ties_match_a_stable_sort(generator):
    # Sums of small integers are exact in any order, so that indices must agree too.
    x, weight = (torch.randint(-2, 3, (n, 16), generator=generator).half().to(DEVICE) for n in (5, 100))
    assert_same_code(encode_topk(x, weight, None, 12), reference.encode_topk(x, weight, None, 12))
    code, _ = encode_batch_topk(x, weight, None, 12, -1)
    assert_same_code(code, reference.encode_batch_topk(x, weight, None, 12))
    assert_same_code(encode_relu(x, weight, None, 60), reference.encode_relu(x, weight, None, 60))


def test_features_sorted_by_cluster(generator):
    centres = torch.randn(5, 48, generator=generator)
    weight = (centres.repeat_interleave(60, 0) + 0.1 * torch.randn(300, 48, generator=generator)).bfloat16()
    x = (centres[[3, 0, 4]] + 0.1 * torch.randn(3, 48, generator=generator)).bfloat16()
    x, weight = x.to(DEVICE), weight.to(DEVICE)
    _, indices, count = encode_topk(x, weight, None, 9)
    expected = reference.encode_topk(x.double(), weight.double(), None, 9)
    assert torch.equal(indices, expected.indices.int())
    assert torch.equal(count, expected.count.int())


def test_nan_is_the_greatest_score_and_is_kept():
    z = torch.arange(300) / 300
    z[[3, 250]] = torch.nan
    values, indices, count = encode_topk(*one_row(z), 3)
    assert indices.tolist() == [[3, 250, 299]]
    assert values[0, :2].isnan().all()
    assert count.tolist() == [3]
    values, indices, _ = encode_relu(*one_row(z - 0.99), 9)
    assert indices[0, :2].tolist() == [3, 250]
    assert values[0, :2].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("capacity", [-1, 0, 5, 300])
def test_relu_matches_reference(generator, chosen, dtype, capacity):
    """5: the rows overflow, keep their first features and report their true count."""
    x, weight, bias = problem(generator, dtype, N=18, F=101)
    values, indices, count = encode_relu(x, weight, bias, capacity)
    expected = reference.encode_relu(*double(x, weight, bias), None if capacity < 0 else capacity)
    assert chosen
    assert values.dtype == dtype
    assert torch.equal(indices, expected.indices.int())
    assert torch.equal(count, expected.count.int())
    assert error(values, expected.values) <= FLOOR[dtype]


@pytest.mark.parametrize("capacity", [-1, 6])
def test_jump_relu_matches_reference(generator, chosen, capacity):
    x, weight, bias = problem(generator, torch.float16, N=5, F=101)
    threshold = torch.rand(101, generator=generator).to(DEVICE) + 0.05
    values, indices, count, l0, band = encode_jump_relu(x, weight, bias, threshold, 0.4, capacity)
    slots = None if capacity < 0 else capacity
    expected = reference.encode_jump_relu(*double(x, weight, bias, threshold), 0.4, slots)
    assert chosen
    assert torch.equal(indices.long(), expected.indices)
    assert torch.equal(count.long(), expected.count)
    assert torch.equal(l0.double(), expected.l0)
    assert torch.equal(band, expected.band)
    assert error(values, expected.values) <= FLOOR[torch.float16]


@pytest.mark.parametrize("k", [1, 4, 90])
def test_batch_topk_matches_reference(generator, chosen, k):
    x, weight, bias = problem(generator, torch.bfloat16, N=6, F=101)
    (values, indices, count), tau = encode_batch_topk(x, weight, bias, k, -1)
    expected = reference.encode_batch_topk(*double(x, weight, bias), k)
    assert chosen == [(6, 16)]
    assert torch.equal(indices, expected.indices.int())
    assert torch.equal(count, expected.count.int())
    assert error(values, expected.values) <= FLOOR[torch.bfloat16]
    positive = (x.double() @ weight.double().T + bias.double()).flatten().clamp_min(0).sort(descending=True).values
    assert abs(tau.item() - positive[6 * k - 1].item()) < 1e-5


def assert_screened(x, weight, bias, k):
    values, indices, count = encode_topk_screened(x, weight, bias, k)
    expected = reference.encode_topk(*double(x, weight, bias), k)
    assert torch.equal(indices, expected.indices.int())
    assert torch.equal(count, expected.count.int())
    assert error(values, expected.values) < 1e-6


@pytest.mark.parametrize("k", [1, 5])
def test_screening_gives_the_float32_code(generator, chosen, k):
    x, weight, bias = problem(generator, torch.float32, N=5, F=301)
    assert_screened(x, weight, bias, k)
    assert chosen


def test_screening_settles_rows_with_too_many_candidates(generator, chosen):
    weight = torch.ones(150, 16) + 1e-4 * torch.randn(150, 16, generator=generator)
    x, weight = torch.ones(2, 16, device=DEVICE), weight.to(DEVICE)
    x[1] = -1
    assert_screened(x, weight, None, 3)
    assert chosen


def test_only_groups_that_reach_their_bound_are_listed(generator):
    x, weight, bias = problem(generator, torch.float16, N=5, F=700)
    maxima = filter_gemm.sampled_maxima(x, weight, bias)
    bounds = filter_gemm.row_bounds(maxima, 2)
    scores = filter_gemm.filtered_scores(x, weight, bias, bounds=bounds)
    exact = x.double() @ weight.double().T + bias.double()
    tile, size = _launch.blocks("filter_gemm", x)["BLOCK_F"], scores.group
    groups = torch.nn.functional.pad(exact, (0, -700 % tile), value=-torch.inf).view(5, -1, size).amax(-1)
    sampled = groups.view(5, -1, tile // size)[:, :: filter_gemm.SAMPLED].flatten(1)
    assert error(maxima.view(torch.float32), sampled.relu()) < 1e-6
    level, second = bounds.view(torch.float32), sampled.topk(2).values[:, 1]
    assert ((level < second) & (level > 0.8 * second)).all()  # lower where the two share a lane
    assert scores.numbers is not None
    assert scores.found is not None
    for row in range(5):
        numbers, places = [], []
        for segment, found in enumerate(scores.found[row].tolist()):
            numbers += scores.numbers[row, segment, :found].tolist()
            places.append(scores.z[row, segment, :found])
        assert numbers == (groups[row] >= level[row]).nonzero()[:, 0].tolist()
        listed = torch.cat(places).flatten()
        features = (torch.tensor(numbers)[:, None] * size + torch.arange(size)).flatten()
        there = (features < 700).to(DEVICE)
        assert error(listed[there], exact[row, features[features < 700].to(DEVICE)]) < 1e-6
    if not torch.cuda.is_available():  # where memory is poisoned to the last number
        written = scores.z.isfinite().any(-1).sum((1, 2))
        assert torch.equal(written, scores.found.sum(1))
    assert scores.found.sum() < groups.numel() / 2


def test_where_the_sampled_tiles_hold_fewer_than_k_positive_groups_all_positive_ones_are_listed(generator):
    z = torch.full((300,), -1.0)
    z[40:300:3] = torch.rand(87, generator=generator).half().float() + 1
    inputs = one_row(z)
    assert_same_code(encode_topk(*inputs, 64), reference.encode_topk(*inputs, 64))


def test_chunks_of_rows_give_the_same_code_as_one(generator, monkeypatch, chosen):
    x, weight, bias = problem(generator, torch.float16, N=7, F=60)
    encoders = (lambda: encode_topk(x, weight, bias, 3), lambda: encode_relu(x, weight, bias, -1))
    whole = [encode() for encode in encoders]
    monkeypatch.setattr(module, "row_chunks", lambda *_: [(0, 3), (3, 4), (4, 7)])
    for encode, expected in zip(encoders, whole, strict=True):
        for part, expected_part in zip(encode(), expected, strict=True):
            assert torch.equal(part, expected_part)
    assert len(chosen) == 2 + 6


def test_strided_inputs_and_no_tokens(generator):
    x, weight, bias = problem(generator, torch.float16, N=6)
    ours = encode_topk(x[::2], weight.t().contiguous().t(), bias, 5)
    for part, expected in zip(ours, encode_topk(x, weight, bias, 5), strict=True):
        assert torch.equal(part, expected[::2])
    for values, indices, count in (
        encode_topk(x[:0], weight, bias, 5),
        encode_relu(x[:0], weight, bias, 5),
        encode_batch_topk(x[:0], weight, bias, 5, 5)[0],
    ):
        assert values.shape == indices.shape == (0, 5)
        assert count.shape == (0,)


@pytest.mark.parametrize(
    ("dtype", "D", "most", "serves"),
    [
        (torch.float16, 16, 5, True),
        (torch.float16, 16, 4, False),
        (torch.float16, 7, 5, False),
        (torch.float32, 16, 5, False),
    ],
)
def test_problems_it_does_not_serve_go_the_first_way(generator, monkeypatch, chosen, dtype, D, most, serves):
    monkeypatch.setattr(module, "MOST_SELECTED", most)
    x, weight, bias = problem(generator, dtype, D=D)
    _, indices, _ = encode_topk(x, weight, bias, 5)
    assert bool(chosen) == serves
    assert torch.equal(indices, reference.encode_topk(*double(x, weight, bias), 5).indices.int())


def test_encoding_twice_agrees_to_the_bit(generator):
    x, weight, bias = problem(generator, torch.bfloat16, N=9, F=120)
    for encode in (lambda: encode_topk(x, weight, bias, 9), lambda: encode_relu(x, weight, bias, 20)):
        for first, second in zip(encode(), encode(), strict=True):
            assert torch.equal(first, second)


def test_rounded_weights_of_another_width_are_screened_by_cublas(generator, chosen):
    x, weight, bias = problem(generator, torch.float32, D=7)
    assert round_rows(x)[0].dtype == torch.bfloat16
    assert_screened(x, weight, bias, 2)
    assert not chosen


def test_cublas_is_the_default(monkeypatch):
    monkeypatch.undo()
    assert {way for operator in OPERATORS for way in _launch.VARIANTS[operator].values()} == {"cublas"}
