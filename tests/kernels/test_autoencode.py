"""autoencode: one operator for the whole autoencoder, dense or sparse, and the controller that decides."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerance import assert_as_accurate
from watch import Watch

from e2e_fast import kernels
from e2e_fast.kernels import DensityController, reference
from e2e_fast.kernels.autoencode import PROBE_ROWS
from e2e_fast.kernels.density import REENTRY

N, D, F = 37, 24, 640


def parameters(dtype=torch.float32, bias=0.0):
    x, W_enc, W_dec = torch.randn(N, D), torch.randn(F, D) / D**0.5, torch.randn(F, D)
    return [t.to(dtype) for t in (x, W_enc, bias + 0.1 * torch.randn(F), W_dec, torch.randn(D))]


def run(module, arguments, dtype, **options):
    """x_hat, the dense code and the gradients of a loss that uses all outputs."""
    leaves = [t.to(dtype).detach().requires_grad_() for t in arguments]
    jump = {"threshold": leaves[5]} if len(leaves) > 5 else {}
    x_hat, code = module.autoencode(*leaves[:5], **jump, **options)
    mix = torch.linspace(-1, 1, D, dtype=dtype)
    loss = (x_hat * mix).sum() + (x_hat - 1).square().sum() + 0.3 * code.values.sum()
    if jump:
        loss = loss + (code.l0 * torch.linspace(0, 2, N)).sum()
    return x_hat.detach(), code.to_dense(F).detach(), *torch.autograd.grad(loss, leaves)


NAMES = ("x_hat", "code", "dx", "dW_enc", "db_enc", "dW_dec", "db_dec", "dthreshold")
WAYS = {
    "topk": ({"k": 7}, 0.0),
    "batch topk": ({"k": 7, "batch": True}, 0.0),
    "batch topk with capacity, not normalised": ({"k": 7, "batch": True, "capacity": 40, "normalize": False}, 0.0),
    "relu with capacity": ({"capacity": 400}, 0.0),
    "relu, dense by itself": ({}, 0.0),
    "relu, sparse by itself": ({}, -3.5),
    "relu, not normalised": ({"normalize": False}, -3.5),
    "relu, dense, not normalised": ({"normalize": False}, 0.0),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_and_all_gradients_match_float64(route, way, dtype):
    options, bias = WAYS[way]
    arguments = parameters(dtype, bias)
    exact, naive = run(reference, arguments, torch.float64, **options), run(reference, arguments, dtype, **options)
    for what, a, n, e in zip(NAMES, run(kernels, arguments, dtype, **options), naive, exact, strict=False):
        assert_as_accurate(what, a, n, e)


JUMPS: dict[str, tuple[dict[str, Any], float]] = {
    "with capacity": ({"capacity": 400}, 0.0),
    "dense by itself": ({}, 0.0),
    "sparse by itself": ({}, -3.0),
    "sparse, not normalised": ({"normalize": False}, -3.0),
    "dense, not normalised": ({"normalize": False}, 0.0),
    "no straight-through gradient": ({"bandwidth": 0.0}, -3.0),
}


@pytest.mark.parametrize("way", JUMPS)
def test_jump_relu_and_the_gradients_of_its_thresholds_match_float64(route, way):
    options, bias = JUMPS[way]
    arguments = [*parameters(bias=bias), 0.3 + 0.4 * torch.rand(F)]
    options = {"bandwidth": 0.3, **options}
    exact, naive = (
        run(reference, arguments, torch.float64, **options),
        run(reference, arguments, torch.float32, **options),
    )
    for what, a, n, e in zip(NAMES, run(kernels, arguments, torch.float32, **options), naive, exact, strict=True):
        assert_as_accurate(what, a, n, e)
    assert bool(exact[-1].any()) == bool(options["bandwidth"])


def test_jump_relu_of_bfloat16_compares_float32_scores(route):
    """Scores near 1, thresholds a thousandth apart: of bfloat16 scores and thresholds most would fall together."""
    x, W_enc = torch.ones(N, 1).bfloat16(), torch.linspace(0.9, 1.1, F)[:, None].bfloat16()
    threshold = torch.linspace(0.9, 1.1, F)
    for density in (True, False):
        controller = DensityController(F)
        controller.sparse = density
        _, code = kernels.autoencode(
            x, W_enc, None, W_enc, None, threshold=threshold, bandwidth=1e-3, density=controller
        )
        assert isinstance(code, kernels.JumpCode)
        expected = W_enc[:, 0].float() > threshold
        assert code.to_dense(F)[0].bool().equal(expected)
        assert torch.equal(code.count, torch.full((N,), int(expected.sum()), dtype=torch.int32))
        band = torch.zeros(F, dtype=torch.bool)
        band[code.indices[0].long()[code.band[0]]] = True
        assert torch.equal(band, (W_enc[:, 0].float() - threshold).abs() < 0.5e-3)


def test_jump_relu_dense_and_sparse_steps_are_one_function(route):
    arguments, threshold = parameters(bias=-1.0), 0.2 + torch.rand(F)
    results = []
    for sparse in (False, True):
        density = DensityController(F)
        density.sparse = sparse
        leaves = [t.clone().requires_grad_() for t in (*arguments, threshold)]
        x_hat, code = kernels.autoencode(*leaves[:5], threshold=leaves[5], bandwidth=0.2, density=density)
        assert isinstance(code, kernels.JumpCode)
        assert code.values.shape[1] == F if not sparse else code.values.shape[1] < F
        loss = x_hat.square().sum() + code.l0.sum()
        results.append((x_hat, code.to_dense(F), code.count, code.l0, *torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_a_loss_on_the_l0_alone_reaches_the_thresholds_alone(route):
    for bias in (0.0, -3.0):
        leaves = [t.requires_grad_() for t in (*parameters(bias=bias), torch.full((F,), 0.3))]
        _, code = kernels.autoencode(*leaves[:5], threshold=leaves[5], bandwidth=0.1)
        assert isinstance(code, kernels.JumpCode)
        gradients = torch.autograd.grad(code.l0.sum(), leaves, allow_unused=True)
        assert all(gradient is None for gradient in gradients[:5])
        assert (gradients[5] < 0).any()


def test_inverse_norms_that_are_known_are_used(route):
    x, W_enc, b_enc, W_dec, b_dec = parameters(torch.float64)
    norms = W_dec.norm(dim=-1).reciprocal()
    ways: list[dict[str, Any]] = [{"k": 3}, {}, {"capacity": F}, {"threshold": torch.full((F,), 0.2).double()}]
    for options in ways:
        results = []
        for given in (None, norms):
            W = W_dec.clone().requires_grad_()
            x_hat, _ = kernels.autoencode(x, W_enc, b_enc, W, b_dec, inverse_norms=given, **options)
            results.append((x_hat, torch.autograd.grad(x_hat.square().sum(), W)))
        torch.testing.assert_close(*results)


def test_short_rows_of_a_float16_decoder_are_no_infinities_in_a_dense_step(route):
    x, W_enc, b_enc, W_dec, b_dec = parameters(torch.float16)
    W_dec[5], W_dec[6] = 0, 1e-6
    exact = run(reference, (x, W_enc, b_enc, W_dec, b_dec), torch.float64)
    ours = run(kernels, (x, W_enc, b_enc, W_dec, b_dec), torch.float16)
    naive = run(reference, (x, W_enc, b_enc, W_dec, b_dec), torch.float32)
    for what, a, n, e in zip(NAMES, ours, naive, exact, strict=False):
        if what != "dW_dec":  # of rows so short it is beyond float16
            assert_as_accurate(what, a, n.half(), e)


def test_dense_and_sparse_steps_are_one_function(route):
    arguments = parameters(bias=-1.0)
    results = []
    for sparse in (False, True):
        density = DensityController(F)
        density.sparse = sparse
        x_hat, code = kernels.autoencode(*arguments, density=density)
        assert code.values.shape[1] == F if not sparse else code.values.shape[1] < F
        results.append((x_hat, code.to_dense(F), code.count))
    torch.testing.assert_close(*results)


def test_step_goes_sparse_by_itself_when_few_features_fire(route):
    for bias, sparse in ((0.0, False), (-3.5, True)):
        _, code = kernels.autoencode(*parameters(bias=bias))
        assert (code.values.shape[1] < F) == sparse
        assert not code.overflowed().any()


def test_controller_switches_with_hysteresis():
    density = DensityController(limit=100)
    assert density.sparse is None
    for fullest, sparse in ((300, False), (100, False), (76, False), (75, True), (99, True), (101, False), (80, False)):
        density.observe(torch.tensor([3, fullest, 0]))
        assert density.sparse is sparse, fullest
    density.observe(torch.zeros(0))
    assert density.sparse is False


def test_controller_leaves_room_and_takes_it_back_slowly():
    density = DensityController(limit=2880)
    assert density.capacity == 2880  # nothing is known
    for fullest, capacity in ((2000, 2880), (170, 256), (171, 512), (2500, 2880), (3000, 2880)):
        density.sparse = None
        density.observe(torch.tensor([fullest]))
        assert density.capacity == capacity, fullest
    density.observe(torch.tensor([40]))
    assert (density.sparse, density.capacity) == (True, 64)
    density.observe(torch.tensor([50]))  # more than two thirds of it
    assert density.capacity == 128
    for _ in range(15):
        density.observe(torch.tensor([32]))
    density.observe(torch.tensor([33]))  # more than a quarter: the count begins again
    for _ in range(15):
        density.observe(torch.tensor([32]))
        assert density.capacity == 128
    density.observe(torch.tensor([32]))
    assert density.capacity == 64
    for _ in range(200):
        density.observe(torch.tensor([0]))
    assert density.capacity == 1
    density.observe(torch.tensor([1]))
    assert density.capacity == 2
    density = DensityController(limit=2880)
    density.sparse = True
    for _ in range(16):
        density.observe(torch.tensor([500]))
    assert density.capacity == 2048


def test_a_jump_code_needs_slots_for_its_band_too(route):
    arguments = [*parameters(bias=-3.0), 0.3 + 0.4 * torch.rand(F)]
    x, W_enc, b_enc, *_, threshold = arguments
    code = kernels.encode_jump_relu(x, W_enc, b_enc, threshold, bandwidth=0.3)
    needed = code.needed()
    assert bool((needed > code.count).any())
    assert int(needed.max()) == code.values.shape[1]
    short = kernels.encode_jump_relu(x, W_enc, b_enc, threshold, 0.3, capacity=int(needed.max()) - 1)
    assert torch.equal(short.needed().max(), needed.max())
    density = DensityController(F)
    kernels.autoencode(*arguments[:5], threshold=threshold, bandwidth=0.3, density=density)
    assert density.capacity >= int(needed.max())


def test_steps_whose_bands_need_more_slots_than_the_limit_stay_dense(route):
    arguments = [*parameters(), torch.full((F,), 2.5)]
    x, W_enc, b_enc, *_, threshold = arguments
    code = kernels.encode_jump_relu(x, W_enc, b_enc, threshold, bandwidth=2.0)
    density = DensityController(limit=int(code.needed()[:PROBE_ROWS].max()) - 1)
    assert int(code.count.max()) <= REENTRY * density.limit  # of active features alone there would be room
    for _ in range(3):
        _, code = kernels.autoencode(*arguments[:5], threshold=threshold, bandwidth=2.0, density=density)
        assert density.sparse is False
        assert code.values.shape[1] == F


def test_controller_is_fed_by_every_step(route):
    density = DensityController(limit=F // 16)
    kernels.autoencode(*parameters(bias=0.0), density=density)
    assert density.sparse is False
    kernels.autoencode(*parameters(bias=-3.5), density=density)
    assert density.sparse is True
    kernels.autoencode(*parameters(bias=0.0), density=density)
    assert density.sparse is False


def test_controller_needs_room_for_at_least_one_feature():
    with pytest.raises(ValueError, match="limit must be at least 1 slot, got 0"):
        DensityController(0)


def test_no_tokens_train_nothing(route):
    x, *rest = parameters()
    ways: list[dict[str, Any]] = [{"k": 3}, {}, {"capacity": 4}, {"k": 3, "batch": True}]
    ways += [{"threshold": torch.ones(F)}, {"threshold": torch.ones(F), "capacity": 4}]
    for options in ways:
        leaves = [t.clone().requires_grad_() for t in rest]
        x_hat, _ = kernels.autoencode(x[:0], *leaves, **options)
        assert x_hat.shape == (0, D)
        for gradient in torch.autograd.grad(x_hat.sum(), leaves):
            assert not gradient.any()


def test_only_the_gradients_that_are_asked_for_are_made(route):
    x, W_enc, b_enc, W_dec, b_dec = parameters(bias=-3.5)
    ways: list[dict[str, Any]] = [{"k": 3}, {}]
    for options in ways:
        W = W_dec.clone().requires_grad_()
        kernels.autoencode(x, W_enc, b_enc, W, b_dec, **options)[0].sum().backward()
        exact = W_dec.double().requires_grad_()
        x_hat, _ = reference.autoencode(x.double(), W_enc.double(), b_enc.double(), exact, b_dec.double(), **options)
        x_hat.sum().backward()
        assert W.grad is not None
        torch.testing.assert_close(W.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)


def test_without_biases(route):
    x, W_enc, _, W_dec, _ = parameters()
    ways: list[dict[str, Any]] = [{"k": 3}, {}, {"capacity": F}]
    for options in ways:
        ours, _ = kernels.autoencode(x, W_enc, None, W_dec, None, **options)
        torch.testing.assert_close(ours, reference.autoencode(x, W_enc, None, W_dec, None, **options)[0])


def test_a_loss_on_the_code_alone_leaves_the_decoder_alone(route):
    for options, bias in (({"k": 3}, 0.0), ({}, 0.0), ({}, -3.5)):
        leaves = [t.requires_grad_() for t in parameters(bias=bias)]
        _, code = kernels.autoencode(*leaves, **options)
        code.values.sum().backward()
        x, W_enc, b_enc, W_dec, b_dec = leaves
        assert W_dec.grad is b_dec.grad is None
        assert all(t.grad is not None and t.grad.any() for t in (x, W_enc, b_enc))


def test_float64_inputs_pass_gradcheck(route):
    torch.manual_seed(1)
    leaves = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 4), (9, 4), (9,), (9, 4), (4,))]
    # Within a bandwidth of 0 the straight-through gradient is the true one: none.
    jump = {"threshold": torch.linspace(0.1, 0.5, 9).double(), "bandwidth": 0.0}
    ways: list[dict[str, Any]] = [{"k": 3}, {}, {"capacity": 9}, {"k": 3, "batch": True}, jump, {**jump, "capacity": 9}]
    for options in ways:
        assert torch.autograd.gradcheck(lambda *p, o=options: kernels.autoencode(*p, **o)[0], leaves)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: [a[0], a[1], a[2], a[3][1:], a[4]], "W_dec must have W_enc's shape"),
        (lambda a: [a[0], a[1][:, 1:], a[2], a[3], a[4]], "W_enc must be a matrix"),
        (lambda a: [a[0], a[1], a[2][1:], a[3], a[4]], "b_enc must have shape"),
        (lambda a: [a[0], a[1], a[2], a[3], a[4][1:]], "b_dec must have shape"),
        (lambda a: [a[0], a[1], a[2], a[3].long(), a[4]], "W_dec must be floating point, got torch.int64"),
    ],
)
def test_bad_shapes_are_refused_by_name(change: Callable[..., Any], message):
    with pytest.raises(ValueError, match=message):
        kernels.autoencode(*change(parameters()), k=3)
    with pytest.raises(ValueError, match=r"k must lie in \[1, 640\]"):
        kernels.autoencode(*parameters(), k=641)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 3, "threshold": torch.ones(F)}, "exclude each other"),
        ({"batch": True}, r"batch \(BatchTopK\) needs k"),
        ({"threshold": torch.ones(F - 1)}, r"threshold must have shape \(640,\), got \(639,\)"),
        ({"threshold": torch.ones(F), "bandwidth": -1.0}, "bandwidth must be finite and at least 0, got -1.0"),
        ({"capacity": -2}, "capacity must be at least 0 slots, got -2"),
    ],
)
def test_arguments_that_name_no_activation_are_refused(options, message):
    for module in (kernels, reference) if "exclude" in message or "needs" in message else (kernels,):
        with pytest.raises(ValueError, match=message):
            module.autoencode(*parameters(), **options)


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_results_have_the_same_bits_for_one_and_two_threads(level):
    from e2e_fast.kernels import _native

    core = _native.native()
    assert core is not None
    try:
        core.simd_force(level)
    except ValueError as error:
        pytest.skip(str(error))
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    x, W_enc, b_enc, W_dec, b_dec = (torch.randn(s) for s in ((150, 136), (3000, 136), (3000,), (3000, 136), (136,)))
    unembed, teacher = torch.randn(3001, 136), torch.randn(150, 136)
    try:
        results = []
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            code = kernels.encode_topk(x, W_enc, b_enc, 9)
            y = kernels.decode(code, W_dec, b_dec)
            back = torch.ops.e2e_fast.code_backward(
                code.values, code.indices, None, y, W_dec, x, W_enc, True, True, True, True
            )
            kl = torch.ops.e2e_fast.linear_kl(y, teacher, unembed, None, None, True)
            results.append([*code, y, *back, *kl])
    finally:
        torch.set_num_threads(threads)
        core.simd_force(core.simd_best())
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("way", ["topk", "relu with capacity", "relu, sparse by itself"])
def test_a_watched_call_runs_the_operator_and_gives_the_same_bits(route, way):
    options, bias = WAYS[way]
    arguments = parameters(bias=bias)
    with Watch() as watch:
        watched = run(kernels, arguments, torch.float32, **options)
    assert {"e2e_fast::autoencode", "e2e_fast::code_backward"} <= watch.calls.keys()
    for what, ours, theirs in zip(NAMES, run(kernels, arguments, torch.float32, **options), watched, strict=False):
        assert torch.equal(ours, theirs), what


@pytest.mark.parametrize("way", ["topk", "batch topk with capacity, not normalised", "relu, dense by itself"])
def test_a_second_derivative_is_refused(route, way):
    options, bias = WAYS[way]
    leaves = [t.requires_grad_() for t in parameters(bias=bias)]
    x_hat, _ = kernels.autoencode(*leaves, **options)
    (first,) = torch.autograd.grad(x_hat.square().sum(), leaves[3], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice|no autograd formula was registered"):
        first.sum().backward()
