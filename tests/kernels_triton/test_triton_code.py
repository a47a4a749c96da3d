"""decode and code_backward: gathers over the code and over its transpose."""

from typing import Any

import pytest
import torch
from triton_checks import DEVICE, assert_close, error

from e2e_fast.kernels import SparseCode, reference
from e2e_fast.kernels.triton import _launch, autoencode
from e2e_fast.kernels.triton.autoencode import code_backward, segments, transpose
from e2e_fast.kernels.triton.decode import decode, row_inverse_norms
from e2e_fast.kernels.triton.jump_relu import encode_jump_relu

Problem = tuple[Any, Any, Any, Any, Any, Any, Any]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
NAMES = ("dW_dec", "dW_enc", "db_enc", "dvalues", "dx")


def problem(generator, dtype, N=7, D=19, F=13, K=5) -> Problem:
    """A code with unused slots (zero, negative), an empty row, features without tokens; weights; x; g; dvalues."""

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    values = normal(N, K)
    values[N // 2] = 0
    # Distinct features in a row, and the last two features never used.
    indices = torch.stack([torch.randperm(F - 2, generator=generator)[:K] for _ in range(N)]).int().to(DEVICE)
    return values, indices, normal(F, D), normal(F, D), normal(N, D), normal(N, D), normal(N, K)


def oracle(values, indices, W_dec, W_enc, x, g, dvalues, normalize) -> Any:
    """The five gradients through autograd: scores z with relu, decoded by the reference."""
    W_dec, W_enc, x = (t.detach().clone().requires_grad_() for t in (W_dec, W_enc, x))
    b_enc = torch.zeros_like(W_enc[:, 0], requires_grad=True)
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    z = (x @ W_enc.T + b_enc)[rows, indices.long()]
    used = values > 0
    c = torch.where(used, z - z.detach() + values, 0)  # the given values, with z's gradient
    c.retain_grad()
    y = reference.decode(SparseCode(c, indices, used.sum(-1)), W_dec, normalize=normalize)
    ((y * g).sum() + (c * torch.where(used, dvalues, 0)).sum()).backward()
    assert c.grad is not None
    return W_dec.grad, W_enc.grad, b_enc.grad, torch.where(used, c.grad, 0), x.grad


def backward(values, indices, W_dec, W_enc, x, g, dvalues, normalize) -> Any:
    return code_backward(values, indices, dvalues, g, W_dec, x, W_enc, normalize, True, True, True)


def double(inputs: Problem) -> Problem:
    values, indices, W_dec, W_enc, x, g, dvalues = inputs
    return values.double(), indices, W_dec.double(), W_enc.double(), x.double(), g.double(), dvalues.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("K", [1, 5, 11])
def test_decode_matches_reference(generator, dtype, normalize, K):
    values, indices, weight, *_ = problem(generator, dtype, K=K)
    bias = torch.randn(19, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
    y = decode(values, indices, weight, bias, normalize)
    code = SparseCode(values, indices, (values > 0).sum(-1))
    expected = reference.decode(
        SparseCode(values.double(), *code[1:]), weight.double(), bias.double(), normalize=normalize
    )
    assert y.dtype == dtype
    assert_close("y", y, expected, reference.decode(code, weight, bias, normalize=normalize))


def test_decode_of_an_empty_code_is_the_bias(generator):
    values, indices, weight, *_ = problem(generator, torch.float32)
    bias = torch.randn(19, device=DEVICE)
    assert torch.equal(decode(values[:, :0], indices[:, :0], weight, bias, True), bias.expand(7, 19))
    assert decode(values[:0], indices[:0], weight, bias, True).shape == (0, 19)


def test_decode_never_reads_the_rows_of_unused_slots(generator):
    values, indices, weight, *_ = problem(generator, torch.float32)
    expected = decode(values, indices, weight, None, False)
    assert torch.equal(decode(values, torch.where(values > 0, indices, 2**30), weight, None, False), expected)


def test_decode_is_blind_to_the_length_of_rows_when_it_normalizes(generator):
    values, indices, weight, *_ = problem(generator, torch.float64)
    lengths = torch.rand(13, 1, generator=generator, dtype=torch.float64).to(DEVICE) + 0.5
    assert (
        error(decode(values, indices, weight * lengths, None, True), decode(values, indices, weight, None, True))
        < 1e-14
    )


def test_decode_takes_given_inverse_norms(generator):
    values, indices, weight, *_ = problem(generator, torch.float32)
    norms = row_inverse_norms(weight)
    assert torch.equal(decode(values, indices, weight, None, True, norms), decode(values, indices, weight, None, True))


def test_nan_values_show_in_their_row_alone(generator):
    values, indices, weight, *_ = problem(generator, torch.float32)
    values[1, 2] = torch.nan
    y = decode(values, indices, weight, None, True)
    assert y[1].isnan().all()
    assert y[[0, 2, 3, 4, 5, 6]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_code_backward_matches_autograd(generator, dtype, normalize):
    inputs = problem(generator, dtype)
    ours = backward(*inputs, normalize)
    expected = oracle(*double(inputs), normalize)
    naive = oracle(*inputs, normalize)
    for name, *triple in zip(NAMES, ours, expected, naive, strict=True):
        assert_close(name, *triple)
        assert triple[0].dtype == dtype


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_one_feature_in_every_token_is_summed_whole(generator, index_dtype):
    values, _, W_dec, W_enc, x, g, dvalues = problem(generator, torch.float64, N=11, K=3)
    indices = torch.tensor([[4, 0, 9]], device=DEVICE).expand(11, 3).to(index_dtype)
    inputs = (values.abs() + 0.1, indices, W_dec, W_enc, x, g, dvalues)
    for actual, expected in zip(backward(*inputs, True), oracle(*inputs, True), strict=True):
        assert error(actual, expected) < 1e-12


def test_unused_slots_and_features_get_exact_zeros(generator):
    inputs = problem(generator, torch.float32)
    dW_dec, dW_enc, db_enc, dvalues, dx = backward(*inputs, True)
    assert (dvalues[inputs[0] <= 0] == 0).all()
    assert (dx[3] == 0).all()
    for gradient in (dW_dec, dW_enc, db_enc):
        assert (gradient[-2:] == 0).all()


def test_decoder_gradient_is_orthogonal_to_its_row(generator):
    inputs = problem(generator, torch.float64)
    dW_dec = backward(*inputs, True)[0]
    assert ((dW_dec * inputs[2]).sum(-1).abs() < 1e-12).all()


def test_rows_too_short_to_normalize_are_not_projected(generator):
    values, indices, W_dec, W_enc, x, g, dvalues = problem(generator, torch.float64)
    W_dec[indices[0, 0].item()] *= 1e-14
    inputs = (values, indices, W_dec, W_enc, x, g, dvalues)
    for actual, expected in zip(backward(*inputs, True), oracle(*inputs, True), strict=True):
        assert error(actual, expected) < 1e-12


def test_parts_asked_for_alone_equal_the_whole(generator):
    values, indices, W_dec, W_enc, x, g, dvalues = problem(generator, torch.float32)
    whole = code_backward(values, indices, None, g, W_dec, x, W_enc, True, True, True, True)
    decoder = code_backward(values, indices, None, g, W_dec, None, None, True, True, False, False)
    assert torch.equal(decoder[0], whole[0])
    assert torch.equal(decoder[3], whole[3])
    assert [tuple(decoder[i].shape) for i in (1, 2, 4)] == [(0,)] * 3
    encoder = code_backward(values, indices, whole[3], None, None, x, W_enc, False, False, True, True)
    for i in (1, 2, 4):
        assert torch.equal(encoder[i], whole[i])
    assert encoder[0].shape == (0,)
    with pytest.raises(ValueError, match="needs W_dec with g, or W_enc with x"):
        code_backward(values, indices, dvalues, None, None, None, None, False, False, False, False)


def test_gradients_with_stride_zero(generator):
    values, indices, W_dec, W_enc, x, _, dvalues = problem(generator, torch.float64)
    g = torch.ones((), dtype=torch.float64, device=DEVICE).expand(x.shape)
    inputs = (values, indices, W_dec, W_enc, x, g, dvalues[:1, :1].expand(7, 5))
    for actual, expected in zip(backward(*inputs, True), oracle(*inputs, True), strict=True):
        assert error(actual, expected) < 1e-12


def test_backward_twice_agrees_to_the_bit(generator):
    inputs = problem(generator, torch.float32, N=16)
    for first, second in zip(backward(*inputs, True), backward(*inputs, True), strict=True):
        assert torch.equal(first, second)


def test_capacity_zero_gives_zero_gradients(generator):
    values, indices, W_dec, W_enc, x, g, dvalues = problem(generator, torch.float32)
    gradients = backward(values[:, :0], indices[:, :0], W_dec, W_enc, x, g, dvalues[:, :0], True)
    assert all((gradient == 0).all() for gradient in gradients)


def test_transpose_lists_each_features_slots_in_token_order(generator):
    values, indices, *_ = problem(generator, torch.float32, N=20)
    order, offsets, launch_order = transpose(values, indices, 13)
    spans = offsets.diff()
    for feature in range(13):
        slots = order[offsets[feature] : offsets[feature + 1]]
        expected = ((indices.flatten() == feature) & (values.flatten() > 0)).nonzero()[:, 0]
        assert torch.equal(slots, expected)
    assert (spans[launch_order].diff() <= 0).all()
    assert torch.equal(launch_order.sort().values, torch.arange(13, device=DEVICE))


def skewed(generator, dtype, N=41) -> Problem:
    """Feature 2 in every token, feature 7 in every second one, others now and then."""
    values, indices, *rest = problem(generator, dtype, N=N)
    values, indices = values.abs() + 0.1, indices.clone()
    indices[indices == 2] = 12
    indices[:, 0] = 2
    indices[::2, 1] = torch.where((indices[::2] == 7).any(1), indices[::2, 1], 7)
    return values, indices, *rest


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_feature_of_many_segments_is_summed_whole(generator, dtype):
    inputs = skewed(generator, dtype)
    ours, expected = backward(*inputs, True), oracle(*double(inputs), True)
    for name, *triple in zip(NAMES, ours, expected, oracle(*inputs, True), strict=True):
        assert_close(name, *triple)


@pytest.mark.parametrize("segment", [1, 7])
def test_the_length_of_a_segment_changes_nothing_but_rounding(generator, monkeypatch, segment):
    inputs = skewed(generator, torch.float64, N=19)
    expected = backward(*inputs, True)
    arch = _launch.arch(inputs[0].device)
    for key, options in list(_launch.BLOCKS["code_backward"].items()):
        if key[0] == arch:
            monkeypatch.setitem(_launch.BLOCKS["code_backward"], key, {**options, "SEGMENT": segment})
    first, second = backward(*inputs, True), backward(*inputs, True)
    for a, b, c in zip(first, second, expected, strict=True):
        assert torch.equal(a, b)
        assert error(a, c) < 1e-12


def test_segments_grow_where_their_number_is_limited(generator, monkeypatch):
    inputs = skewed(generator, torch.float64)
    expected = backward(*inputs, True)
    monkeypatch.setattr(autoencode, "MOST_PARTIAL", 3)
    for a, b in zip(backward(*inputs, True), expected, strict=True):
        assert error(a, b) < 1e-12


def test_parts_of_long_features_asked_for_alone_equal_the_whole(generator):
    values, indices, W_dec, W_enc, x, g, _ = skewed(generator, torch.float32)
    whole = code_backward(values, indices, None, g, W_dec, x, W_enc, True, True, True, False)
    decoder = code_backward(values, indices, None, g, W_dec, None, None, True, True, False, False)
    encoder = code_backward(values, indices, whole[3], None, None, x, W_enc, False, False, True, False)
    assert torch.equal(decoder[0], whole[0])
    for i in (1, 2):
        assert torch.equal(encoder[i], whole[i])


@pytest.mark.parametrize("segment", [1, 3, 8, 100])
def test_segments_cover_every_token_of_every_feature_once(generator, segment):
    values, indices, *_ = skewed(generator, torch.float64)
    order, offsets, by_count = transpose(values, indices, 13)
    extra = values.numel() // segment
    ranks, ends = segments(offsets, by_count, segment, extra)
    covered, rows = [], []
    for program, rank in enumerate(ranks.tolist()):
        if rank == 13:
            continue
        feature = int(by_count[rank])
        first, last = int(offsets[feature]), int(offsets[feature + 1])
        many = max(1, -(-(last - first) // segment))
        place = program - (int(ends[rank]) - many)
        assert 0 <= place < many
        covered += range(first + place * segment, min(last, first + (place + 1) * segment))
        if many > 1:
            rows.append(program - rank if place == 0 else extra + program - rank - 1)
    assert covered
    assert sorted(covered) == list(range(int(offsets[-1])))
    assert len(set(rows)) == len(rows)
    assert all(0 <= row < 2 * extra for row in rows)
    assert len(order) == values.numel()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("capacity", [-1, 3, 50])
def test_jump_relu_lists_active_and_nearly_active_features(generator, dtype, capacity):
    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    x, W, b = normal(5, 19), normal(43, 19) / 4, normal(43)
    threshold = torch.rand(43, generator=generator, dtype=torch.float64).to(DEVICE) + 0.05
    values, indices, count, l0, band = encode_jump_relu(x, W, b, threshold.float(), 0.4, capacity)
    wide = [t.double() for t in (x, W, b)]
    expected = reference.encode_jump_relu(*wide, threshold.float().double(), 0.4, None if capacity < 0 else capacity)
    assert values.dtype == dtype
    assert torch.equal(indices.long(), expected.indices)
    assert torch.equal(count.long(), expected.count)
    assert torch.equal(l0.double(), expected.l0)
    assert torch.equal(band, expected.band)
    naive = reference.encode_jump_relu(*wide, threshold.float().double(), 0.4, values.shape[1]).values.to(dtype)
    assert_close("values", values, expected.values, naive)
    assert band.any()


def test_silent_features_of_a_band_get_the_gradient_of_their_value(generator):
    """As kernels.code_backward.silent_gradients asks for it: ones in their slots, dvalues alone."""
    values, indices, W_dec, _, _, g, dvalues = problem(generator, torch.float64)
    silent = values <= 0
    ones = silent.to(values.dtype)
    ours = code_backward(ones, indices, dvalues, g, W_dec, None, None, True, False, False, False)[3]
    unit = W_dec / W_dec.norm(dim=-1, keepdim=True)
    expected = (unit[indices.long()] * g[:, None, :]).sum(-1) + dvalues
    assert error(ours, torch.where(silent, expected, 0)) < 1e-12
