"""The variant of encode_topk whose product writes only groups of features that may hold a winner."""

import pytest
import torch
from test_triton_encode import ROWS, assert_same_code
from test_triton_encode import problem as problem_of_any_width
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_checks import DEVICE, FLOOR, error

from e2e_fast.kernels import reference
from e2e_fast.kernels.triton import _launch, encode_gemm
from e2e_fast.kernels.triton import encode as module
from e2e_fast.kernels.triton.encode import encode_topk

DTYPES = [torch.bfloat16, torch.float16]


def problem(generator, dtype, D=16, **sizes):
    """D a multiple of 16, as this variant wants it."""
    return problem_of_any_width(generator, dtype, D=D, **sizes)


@pytest.fixture(autouse=True)
def chosen(monkeypatch) -> list:
    """The variant is switched on; each chunk it serves is listed."""
    served = []
    run = module.promising_scores
    monkeypatch.setitem(_launch.VARIANTS, "encode_topk", {("any", "any", "any"): "filter_gemm"})
    monkeypatch.setattr(module, "promising_scores", lambda *a: served.append(a[0].shape) or run(*a))
    return served


def one_row(z, dtype=torch.float16):
    """Inputs whose scores are z (F,) exactly, as far as the dtype holds them; x = 1 keeps infinities out of sums."""
    weight = torch.zeros(len(z), 16, dtype=dtype, device=DEVICE)
    weight[:, 0] = z
    return torch.ones(1, 16, dtype=dtype, device=DEVICE), weight, None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("N", "D", "F", "k", "bias"),
    [(1, 16, 40, 1, True), (4, 48, 301, 7, False), (17, 16, 170, 12, True), (3, 32, 31, 31, True)],
)
def test_code_matches_reference(generator, chosen, dtype, N, D, F, k, bias):
    x, weight, b = problem(generator, dtype, N=N, D=D, F=F)
    b = b if bias else None
    values, indices, count = encode_topk(x, weight, b, k)
    expected = reference.encode_topk(x.double(), weight.double(), None if b is None else b.double(), k)
    assert chosen == [(N, D)]
    assert values.dtype == dtype
    assert torch.equal(indices, expected.indices.int())
    assert torch.equal(count, expected.count.int())
    assert error(values, expected.values) <= FLOOR[dtype]


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("k", [1, 9])
def test_code_of_hard_rows(chosen, name, k):
    z = ROWS[name].repeat(3).float()
    inputs = one_row(z)
    ours = encode_topk(*inputs, k)
    assert_same_code(ours, reference.encode_topk(*inputs, k))
    assert torch.equal(ours[0].cpu(), torch.relu(torch.topk(inputs[1][None, :, 0].cpu(), k).values))
    assert chosen


def test_integers_with_many_ties_match_a_stable_sort(generator):
    # Sums of small integers are exact in any order, so that indices must agree too.
    x, weight = (torch.randint(-2, 3, (n, 16), generator=generator).half().to(DEVICE) for n in (20, 260))
    assert_same_code(encode_topk(x, weight, None, 12), reference.encode_topk(x, weight, None, 12))


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


def test_only_groups_that_reach_the_bound_are_written(generator):
    tile = _launch.blocks("topk_gemm", torch.empty(0, dtype=torch.float16, device=DEVICE))["BLOCK_F"]
    F, k = 16 * tile - 6, 2
    x, weight, bias = problem(generator, torch.float16, N=5, F=F)
    z, group_max, span = encode_gemm.promising_scores(x, weight, bias, k)
    exact = x.double() @ weight.double().T + bias.double()
    first = torch.arange(F, device=DEVICE) // tile % encode_gemm.FIRST_OF == 0
    groups = torch.nn.functional.pad(exact, (0, 6), value=-torch.inf).view(5, -1, span).amax(-1)
    bound = groups[:, torch.nn.functional.pad(first, (0, 6)).view(-1, span)[:, 0]].topk(k).values[:, -1:]
    written = first | (groups >= bound).repeat_interleave(span, 1)[:, :F]
    assert error(z[written], exact[written]) < 1e-6
    assert error(group_max.view(torch.float32), groups.relu()) < 1e-6
    assert written.float().mean() < 0.6
    if not torch.cuda.is_available():  # where memory is poisoned to the last number
        assert z[~written].isnan().all()


def test_where_the_first_tiles_hold_fewer_than_k_positive_groups_all_positive_ones_are_written(generator):
    z = torch.full((300,), -1.0)
    z[40:300:3] = torch.rand(87, generator=generator).half().float() + 1
    inputs = one_row(z)
    assert_same_code(encode_topk(*inputs, 64), reference.encode_topk(*inputs, 64))


def test_chunks_of_rows_give_the_same_code_as_one(generator, monkeypatch, chosen):
    x, weight, _ = problem(generator, torch.float16, N=130, F=30)
    whole = encode_topk(x, weight, None, 3)
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    for part, expected in zip(encode_topk(x, weight, None, 3), whole, strict=True):
        assert torch.equal(part, expected)
    assert len(chosen) == 3


def test_strided_inputs_and_no_tokens(generator):
    x, weight, bias = problem(generator, torch.float16, N=6)
    ours = encode_topk(x[::2], weight.t().contiguous().t(), bias, 5)
    for part, expected in zip(ours, encode_topk(x, weight, bias, 5), strict=True):
        assert torch.equal(part, expected[::2])
    values, indices, count = encode_topk(x[:0], weight, bias, 5)
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
    assert torch.equal(indices, reference.encode_topk(x.double(), weight.double(), bias.double(), 5).indices.int())


def test_encoding_twice_agrees_to_the_bit(generator):
    x, weight, bias = problem(generator, torch.bfloat16, N=9, F=200)
    for first, second in zip(encode_topk(x, weight, bias, 9), encode_topk(x, weight, bias, 9), strict=True):
        assert torch.equal(first, second)


def test_launching_reads_no_number_off_the_device(monkeypatch, chosen):
    launched = []
    for place in (module, encode_gemm):
        monkeypatch.setattr(place, "launch", lambda kernel, *_, **__: launched.append(kernel))
    with FakeTensorMode():  # holds no data: an .item(), or a shape that depends on values, raises
        x, weight = (torch.empty(n, 16, dtype=torch.bfloat16, device=DEVICE) for n in (200, 2000))
        values, _, count = encode_topk(x, weight, torch.empty(2000, device=DEVICE), 8)
    assert (values.shape, count.shape) == ((200, 8), (200,))
    kernels = [encode_gemm.topk_gemm_kernel, encode_gemm.topk_bound_kernel, encode_gemm.topk_gemm_kernel]
    assert launched == [*kernels, module.topk_scan_kernel, module.topk_rank_kernel]
    assert chosen


def test_the_first_way_is_the_default(monkeypatch, generator):
    monkeypatch.undo()
    assert set(_launch.VARIANTS["encode_topk"].values()) == {"scan"}
