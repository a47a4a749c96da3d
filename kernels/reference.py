"""The whole method in plain torch: the specification that every fused operator is tested against.

Shapes: N tokens, D = d_in, F = d_sae, K slots, V vocabulary. Weights are ``[F, D]``, both of them.

    encode   c = relu(x W_encᵀ + b_enc)                    encode_relu; encode_topk keeps the k largest of a token,
                                                           encode_batch_topk the k·N largest of the batch,
                                                           encode_jump_relu those above a threshold a feature
    decode   x̂ = Σ_j c_j · W_dec[j] / ‖W_dec[j]‖ + b_dec   decoder-normalised; gradients see the normalisation
    KL       mean_n Σ_v p_t(v) (log p_t(v) - log p_s(v))   p = softmax(h W_Uᵀ + b_U); t teacher, s student

Everything differentiates through autograd, works in float64, and builds every intermediate matrix. A NaN
pre-activation counts as active, and as the greatest, so that NaN propagates.

>>> import torch
>>> h = torch.randn(5, 8)
>>> linear_kl(h, h, torch.randn(11, 8)).item()
0.0
"""

import torch
import torch.nn.functional as nnf
from torch import Tensor

from e2e_fast.kernels.sparse_code import JumpCode, SparseCode, compacted

BANDWIDTH = 1e-3
"""Width of the rectangle under JumpReLU's straight-through gradients (Rajamanoharan et al. 2024: 0.001)."""

NORM_EPS = 1e-12
"""Rows shorter than this are divided by it instead of by their norm, as in ``torch.nn.functional.normalize``."""


def encode_relu(x: Tensor, weight: Tensor, bias: Tensor | None = None, capacity: int | None = None) -> SparseCode:
    """``relu(x @ weight.T + bias)`` as a sparse code, each row's features in ascending order.

    x (N, D), weight (F, D), bias (F,). ``capacity=None`` makes room for the fullest row; a row that needs more slots
    than an explicit capacity keeps its first ones and reports its true L0 in ``count``.
    """
    return SparseCode.from_dense(torch.relu(nnf.linear(x, weight, bias)), capacity)


def encode_topk(x: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> SparseCode:
    """relu of the k largest entries of ``x @ weight.T + bias``, descending; equal values: lower index first.

    x (N, D), weight (F, D), bias (F,) → values and indices (N, k). Raises ValueError unless 1 ≤ k ≤ F.
    """
    check_k(k, weight.shape[0])
    z = nnf.linear(x, weight, bias)
    values, indices = torch.sort(z, dim=-1, descending=True, stable=True)
    return _relu_code(values[:, :k], indices[:, :k])


def encode_batch_topk(
    x: Tensor, weight: Tensor, bias: Tensor | None, k: int, capacity: int | None = None
) -> SparseCode:
    """The k·N largest positive entries of the whole of ``x @ weight.T + bias``, each row's in ascending order.

    x (N, D), weight (F, D), bias (F,); a token keeps k features on average (Bussmann et al. 2024, arXiv 2412.06410).
    Entries equal to the smallest kept one are all kept, so ties can add to k·N. ``capacity`` as in `encode_relu`.
    """
    check_k(k, weight.shape[0])
    z = nnf.linear(x, weight, bias)
    positive = z[~(z <= 0)]
    if positive.numel() > k * x.shape[0]:
        smallest = torch.topk(positive, k * x.shape[0]).values[-1]
        z = torch.where(z < smallest, 0, z)
    return SparseCode.from_dense(torch.relu(z), capacity)


def encode_jump_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
    bandwidth: float = BANDWIDTH,
    capacity: int | None = None,
) -> JumpCode:
    """``z * (z > threshold)`` for ``z = x @ weight.T + bias``: a jump at each feature's own threshold θ.

    x (N, D), weight (F, D), bias and threshold (F,); a threshold below 0 counts as 0. The value jumps at θ, so its true
    derivative in θ is 0 almost everywhere; the straight-through one is the derivative of the *expected* value, its
    density at θ estimated by a rectangle of width ε = ``bandwidth`` (Rajamanoharan et al. 2024, arXiv 2407.14435):

        ∂c/∂θ = -θ/ε  and  ∂L0/∂θ = -1/ε   where |z - θ| < ε/2 and z > 0, else 0

    ``bandwidth=0`` gives no gradient to θ. ``capacity`` as in `encode_relu`; slots of the band count.
    """
    z = nnf.linear(x, weight, bias)
    active = ~((z <= threshold) | (z <= 0))
    band = ((z - threshold).abs() < bandwidth / 2) & (z > 0)
    # Zero, but not its gradient: 1/ε within the band.
    pull = torch.where(band, threshold - threshold.detach(), 0) * (1 / bandwidth if bandwidth else 0.0)
    c = torch.where(active, z, 0) - threshold.detach() * pull
    indices, used, kept = compacted(active | band, capacity)
    count = torch.where(kept > indices.shape[1], kept, active.sum(-1))
    values = torch.where(used, c.gather(1, indices), 0)
    l0 = count - torch.where(used, pull.gather(1, indices), 0).sum(-1)
    return JumpCode(values, indices, count, l0, band.gather(1, indices) & used)


def decode(code: SparseCode | JumpCode, weight: Tensor, bias: Tensor | None = None, normalize: bool = True) -> Tensor:
    """Weighted sum of dictionary rows: ``(values[..., None] * unit(weight)[indices]).sum(-2) + bias``.

    code.values, code.indices (N, K); weight (F, D), rows need not be unit; returns (N, D). With ``normalize`` the
    gradient of a row is its tangent projection divided by the row's norm (Braun et al. 2024, App. D).
    """
    rows = nnf.normalize(weight, dim=-1, eps=NORM_EPS) if normalize else weight
    live = ~(code.values <= 0)
    if isinstance(code, JumpCode):
        live = live | code.band
    values = torch.where(live, code.values, 0)
    out = (values[..., None] * rows[code.indices.long()]).sum(-2)
    return out if bias is None else out + bias


def autoencode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    W_dec: Tensor,
    b_dec: Tensor | None,
    *,
    k: int | None = None,
    batch: bool = False,
    threshold: Tensor | None = None,
    bandwidth: float = BANDWIDTH,
    capacity: int | None = None,
    normalize: bool = True,
) -> tuple[Tensor, SparseCode | JumpCode]:
    """A whole SAE: ``decode(encode(x))`` and the code; ReLU unless ``k`` or ``threshold`` is given.

    ``k``: TopK, or with ``batch`` BatchTopK; ``threshold``: JumpReLU, whose code is a `JumpCode`. The fused operator
    differs from the composition only in its backward: one pass over the transposed code yields dW_dec, dW_enc, db_enc
    and dvalues.
    """
    check_activation(k, batch, threshold)
    if threshold is not None:
        code = encode_jump_relu(x, W_enc, b_enc, threshold, bandwidth, capacity)
    elif k is None:
        code = encode_relu(x, W_enc, b_enc, capacity)
    else:
        code = encode_batch_topk(x, W_enc, b_enc, k, capacity) if batch else encode_topk(x, W_enc, b_enc, k)
    return decode(code, W_dec, b_dec, normalize=normalize), code


def linear_kl(
    student: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor | None = None, *, softcap: float | None = None
) -> Tensor:
    """KL(teacher ‖ student) over the vocabulary in nats, mean over tokens; the gradient goes to ``student`` alone.

    student, teacher (N, D) final hidden states (after the last norm), weight (V, D) unembedding, bias (V,). ``softcap``
    c replaces the logits z by c·tanh(z / c) (Gemma 2). A teacher logit of -inf is legal (probability 0).
    """
    log_t = nnf.log_softmax(_logits(teacher, weight, bias, softcap).detach(), dim=-1)
    log_s = nnf.log_softmax(_logits(student, weight, bias, softcap), dim=-1)
    p_t = log_t.exp()
    # Where p_t is 0 the difference may be inf - inf: masked before the product, so that no gradient is NaN either.
    terms = p_t * torch.where(p_t == 0, 0, log_t - log_s)
    return terms.sum(-1).mean()


def linear_kl_shared(
    students: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor | None = None, *, softcap: float | None = None
) -> Tensor:
    """`linear_kl` of each of S students (S, N, D) against one teacher (N, D): S losses."""
    return torch.stack([linear_kl(student, teacher, weight, bias, softcap=softcap) for student in students])


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None = None, softcap: float | None = None
) -> Tensor:
    """``softmax(scale · q kᵀ, over keys up to the query's own token) v``, tokens before heads in the result.

    q (B, H, T, D), k and v (B, K, T, D), K a divisor of H: query head h reads key head h // (H / K). ``window``: a
    token attends to so many, itself among them. ``softcap`` c makes scores c · tanh(s / c).
    """
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = scale * q @ k.mT
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen_keys(q.shape[2], window, q.device), -torch.inf)
    return (torch.softmax(scores, -1) @ v).transpose(1, 2)


def seen_keys(tokens: int, window: int | None, device: torch.device) -> Tensor:
    """(T, T): whether query i attends to key j."""
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
    return seen if window is None else seen.triu(1 - window)


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """``x · Φ(x)``, Φ the normal distribution; with "tanh" ``x · ½ (1 + tanh(√(2/π) (x + 0.044715 x³)))``."""
    if approximate == "tanh":
        return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    return 0.5 * x * torch.erfc(-x / 2**0.5)


def branch(
    x: Tensor,
    first: tuple[Tensor, Tensor | None],
    *,
    norm: tuple[Tensor, Tensor, float] | None = None,
    gelu: str = "none",
    second: tuple[Tensor, Tensor | None] | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``residual + W₂ gelu(W₁ norm(x) + b₁) + b₂``: layers are (weight, bias), ``norm`` is (gain, shift, eps)."""
    if norm is not None:
        x = nnf.layer_norm(x, x.shape[-1:], *norm)
    y = nnf.linear(x, *first)
    if second is not None:
        y = nnf.linear(nnf.gelu(y, approximate=gelu), *second)
    return y if residual is None else residual + y


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    z = nnf.linear(hidden, weight, bias)
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _relu_code(values: Tensor, indices: Tensor) -> SparseCode:
    used = ~(values <= 0)  # NaN counts as used: it must not disappear
    return SparseCode(torch.where(used, values, 0), torch.where(used, indices, 0), used.sum(-1))


def adam_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: Tensor,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip: Tensor | None = None,
    inverse_norms: Tensor | None = None,
    shadow: Tensor | None = None,
) -> None:
    """One update of ``torch.optim.Adam`` in place, from the gradient times ``clip``; norms and copy of the new rows.

    param, grad, exp_avg, exp_avg_sq, shadow (F, D), inverse_norms (F,); step (from 1), lr and clip ().
    """
    beta1, beta2 = betas
    g = (grad if clip is None else clip * grad) + weight_decay * param
    exp_avg += (1 - beta1) * (g - exp_avg)
    exp_avg_sq.mul_(beta2).add_((1 - beta2) * g.square())
    m, v = exp_avg / (1 - beta1**step), exp_avg_sq / (1 - beta2**step)
    param -= lr * m / (v.sqrt() + eps)
    if inverse_norms is not None:
        inverse_norms.copy_(1 / param.norm(dim=-1).clamp_min(NORM_EPS))
    if shadow is not None:
        shadow.copy_(param)


def check_k(k: int, d_sae: int) -> None:
    """Raises ValueError unless 1 ≤ k ≤ d_sae."""
    if not 1 <= k <= d_sae:
        raise ValueError(f"k must lie in [1, {d_sae}] (the number of features), got {k}")


def check_activation(k: int | None, batch: bool, threshold: Tensor | None) -> None:
    """Raises ValueError unless these arguments of `autoencode` name one activation."""
    if k is not None and threshold is not None:
        raise ValueError("k (TopK) and threshold (JumpReLU) exclude each other, got both")
    if batch and k is None:
        raise ValueError("batch (BatchTopK) needs k, got None")
