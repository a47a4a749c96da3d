"""The sparse autoencoder, and its weights under e2e_sae's keys.

    z = W_enc x + b_enc                            (N, F)
    c = activation(z)                              (N, F)
    x̂ = Σ_j c_j · W_dec[j] / ‖W_dec[j]‖ + b_dec    (N, D)

    relu         max(z, 0): e2e_sae's activation
    topk         the k largest positive z of every token
    batch_topk   the k·N largest positive z of the batch in training; else z > a running mean of the smallest kept one
    jump_relu    z > θ_j, a trained threshold for every feature

Decoder rows are normalised inside autograd on every forward; Adam updates the raw rows, whose gradient is therefore
tangent to them. No tied weights, no subtraction of b_dec from the input (Braun et al. 2024).

JumpReLU trains log θ (as Rajamanoharan et al. 2024 do): θ stays positive with nothing to clamp, and a step of Adam
changes it by a share of itself, where the same step on θ = 0.001 would be half of it.

>>> import torch
>>> sae = SAE(d_in=16, d_sae=64)
>>> acts = sae(torch.randn(2, 5, 16))
>>> acts.output.shape, acts.c.shape
(torch.Size([2, 5, 16]), torch.Size([2, 5, 64]))
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from e2e_fast import kernels
from e2e_fast.kernels import DensityController, JumpCode, SparseCode
from e2e_fast.kernels.density import default_limit
from e2e_fast.kernels.reference import BANDWIDTH
from e2e_fast.optimizer import Shadow
from e2e_fast.positions import hyphenated
from e2e_fast.precision import as_given, lowered, reduced_dtype

Activation = Literal["relu", "topk", "batch_topk", "jump_relu"]

THRESHOLD = 1e-3
"""JumpReLU's thresholds before training (Rajamanoharan et al. 2024)."""

THRESHOLD_RATE = 0.01
"""How far BatchTopK's running threshold moves towards that of a batch, late in training."""

THRESHOLD_SHARE = 9
"""Early in training it averages over about the last 1/9 of the batches so far: it moves by 10 / (batches + 9)."""


class Linear(NamedTuple):
    """Weight and bias of one half of an SAE in ``torch.nn.Linear``'s orientation (a view)."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class SAEActs:
    """What an SAE did to a batch."""

    input: Tensor
    """[..., d_in] the activation that arrived."""
    output: Tensor
    """[..., d_in] its reconstruction."""
    code: SparseCode | JumpCode
    """The codes of the N flattened tokens. While most features fire K = d_sae and slot j is feature j."""
    d_sae: int

    @property
    def is_dense(self) -> bool:
        """Whether slot j of every token is feature j."""
        return self.code.values.shape[1] == self.d_sae and self.code.indices.stride(0) == 0

    @property
    def c(self) -> Tensor:
        """[..., d_sae] dense codes."""
        dense = self.code.values if self.is_dense else self.code.to_dense(self.d_sae)
        return dense.view(*self.input.shape[:-1], self.d_sae)

    def norm(self, p: float) -> Tensor:
        """(N,) ‖c‖_p of every token, in float32 (float64 for such codes).

        p = 0 is the L0: constant to autograd, but for JumpReLU, whose thresholds get a straight-through gradient.
        """
        values = self.code.values
        dtype = torch.promote_types(values.dtype, torch.float32)
        if p == 0:
            return self.code.l0 if isinstance(self.code, JumpCode) else self.code.count.to(dtype)
        return values.sum(-1, dtype=dtype) if p == 1 else torch.linalg.vector_norm(values, ord=p, dim=-1, dtype=dtype)

    def l0(self) -> Tensor:
        """(N,) active features of every token."""
        return self.code.count

    def counts(self) -> Tensor:
        """(d_sae,) int64: on how many tokens each feature fires."""
        used = self.code.values.detach() > 0
        return used.sum(0) if self.is_dense else torch.bincount(self.code.indices[used], minlength=self.d_sae)


class SAE(nn.Module):
    """One sparse autoencoder; parameters W_enc and W_dec are [d_sae, d_in].

    ``activation`` None means TopK with ``k`` and ReLU without; ``k`` belongs to "topk" and "batch_topk" (there on
    average). "jump_relu" trains ``log_threshold`` [d_sae], starts at ``threshold`` and takes straight-through gradients
    of this ``bandwidth``, both in units of the activations before it. ``normalize_decoder=False`` decodes with W_dec as
    it is. ``init="e2e_sae"`` draws the same numbers as the reference: ``torch.nn.Linear``'s default for the encoder and
    both biases, a random (semi-)orthogonal decoder. ``init="empty"`` leaves the weights to be loaded.

    BatchTopK depends on the batch in training alone, that is in train mode with gradients enabled. Elsewhere, and in
    `encode`, a token keeps what exceeds ``running_threshold``, an average over the last batches in training (at most
    about 100, at most a ninth of all) of the smallest activation that a batch kept; 0 before the first batch: ReLU.
    """

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        k: int | None = None,
        activation: Activation | None = None,
        normalize_decoder: bool = True,
        threshold: float = THRESHOLD,
        bandwidth: float = BANDWIDTH,
        init: str = "e2e_sae",
    ) -> None:
        super().__init__()
        self.activation = resolve_activation(activation, k)
        for name, size in (("d_in", d_in), ("d_sae", d_sae)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if k is not None:
            kernels.reference.check_k(k, d_sae)
        if not threshold > 0:
            raise ValueError(f"threshold must be above 0, got {threshold}")
        self.d_in, self.d_sae, self.k = d_in, d_sae, k
        self.normalize_decoder, self.bandwidth = normalize_decoder, bandwidth
        self.density = DensityController(default_limit(d_sae))
        if init == "e2e_sae":
            encoder, decoder = nn.Linear(d_in, d_sae), nn.Linear(d_sae, d_in)
            W_dec = nn.init.orthogonal_(decoder.weight.detach().T)
            tensors = (encoder.weight.detach(), encoder.bias.detach(), W_dec, decoder.bias.detach())
        elif init == "empty":
            tensors = (torch.empty(d_sae, d_in), torch.empty(d_sae), torch.empty(d_sae, d_in), torch.empty(d_in))
        else:
            raise ValueError(f"init must be 'e2e_sae' or 'empty', got {init!r}")
        self.W_enc, self.b_enc, self.W_dec, self.b_dec = (nn.Parameter(t.contiguous()) for t in tensors)
        self.shadows = {"W_enc": Shadow(self.W_enc, norms=False), "W_dec": Shadow(self.W_dec, norms=normalize_decoder)}
        if self.activation == "jump_relu":
            self.log_threshold = nn.Parameter(torch.full((d_sae,), threshold).log())
        if self.activation == "batch_topk":
            self.running_threshold: Tensor
            self.register_buffer("running_threshold", torch.zeros(()))
            self.threshold_batches: Tensor
            self.register_buffer("threshold_batches", torch.zeros(()))

    def forward(self, x: Tensor, capacity: int | None = None) -> SAEActs:
        """Encode and decode activations [..., d_in].

        ReLU and JumpReLU find out how many features fire; with ``capacity`` they do not, and keep as many of a token.
        """
        _check_width("x", x, "d_in", self.d_in)
        (flat,) = lowered(x.reshape(-1, self.d_in))
        W_enc, W_dec, shadow = self._cast("W_enc"), self._cast("W_dec"), self.shadows["W_dec"]
        norms = shadow.inverse_norms if shadow.holds(self.W_dec) else None
        by_batch = self.activation == "batch_topk" and self.training and torch.is_grad_enabled()
        chosen: dict[str, Any] = {"k": self.k, "batch": by_batch}
        if (thresholds := self.thresholds) is not None and not by_batch:
            chosen = {"threshold": thresholds, "bandwidth": self.bandwidth if self.activation == "jump_relu" else 0.0}
        with as_given(x.device):
            output, code = kernels.autoencode(
                flat, W_enc, self.b_enc, W_dec, self.b_dec,
                normalize=self.normalize_decoder, density=self.density, capacity=capacity, inverse_norms=norms,
                **chosen,
            )  # fmt: skip
        if by_batch:
            self._observe_threshold(code.values.detach())
        return SAEActs(x, output.to(x.dtype).view_as(x), code, self.d_sae)

    def _cast(self, name: str) -> Tensor:
        """W_enc or W_dec as autocast has it: the optimizer's rounded copy while that is the parameter's."""
        weight, shadow = getattr(self, name), self.shadows[name]
        rounds = reduced_dtype(weight.device) == torch.bfloat16
        return _Rounded.apply(weight, shadow.rounded) if rounds and shadow.holds(weight) else lowered(weight)[0]

    @property
    def thresholds(self) -> Tensor | None:
        """[d_sae] what a pre-activation must exceed: JumpReLU's trained ones, BatchTopK's running one; else None."""
        if self.activation == "jump_relu":
            return self.log_threshold.exp()
        return self.running_threshold.expand(self.d_sae) if self.activation == "batch_topk" else None

    @torch.no_grad()
    def _observe_threshold(self, values: Tensor) -> None:
        """Moves the running threshold towards the smallest activation kept; waits for no GPU.

        A constant rate would leave the threshold of a short training near that of the first weights. Polynomially
        decaying weights (Shamir & Zhang 2013) follow from the first batch on, until the constant rate is the slower.
        """
        if values.numel() == 0:
            return
        smallest = torch.where(values > 0, values, torch.inf).amin().to(self.running_threshold.dtype)
        some = smallest.isfinite()
        batches = self.threshold_batches + some
        rate = ((THRESHOLD_SHARE + 1) / (batches + THRESHOLD_SHARE)).clamp(THRESHOLD_RATE, 1)
        moved = torch.lerp(self.running_threshold, smallest, rate)
        self.running_threshold.copy_(torch.where(some, moved, self.running_threshold))
        self.threshold_batches.copy_(batches)

    def encode(self, x: Tensor) -> Tensor:
        """Dense codes [..., d_sae] of activations [..., d_in]; a token's does not depend on the others."""
        return self.encode_sparse(x).to_dense(self.d_sae).view(*x.shape[:-1], self.d_sae)

    def encode_sparse(self, x: Tensor) -> SparseCode | JumpCode:
        """Codes of the N flattened tokens, with room for the fullest of them (or for k)."""
        _check_width("x", x, "d_in", self.d_in)
        flat = x.reshape(-1, self.d_in)
        if (thresholds := self.thresholds) is not None:
            bandwidth = self.bandwidth if self.activation == "jump_relu" else 0.0
            return kernels.encode_jump_relu(flat, self.W_enc, self.b_enc, thresholds, bandwidth)
        if self.k is not None:
            return kernels.encode_topk(flat, self.W_enc, self.b_enc, self.k)
        return kernels.encode_relu(flat, self.W_enc, self.b_enc)

    def decode(self, c: Tensor) -> Tensor:
        """Reconstruction [..., d_in] of dense codes [..., d_sae]."""
        _check_width("c", c, "d_sae", self.d_sae)
        rows = nn.functional.normalize(self.W_dec, dim=-1) if self.normalize_decoder else self.W_dec
        return c @ rows + self.b_dec

    @property
    def dict_elements(self) -> Tensor:
        """[d_in, d_sae] unit dictionary directions, one a column, as in e2e_sae."""
        return nn.functional.normalize(self.W_dec, dim=-1).T

    @property
    def encoder(self) -> tuple[Linear]:
        """``sae.encoder[0].weight`` [d_sae, d_in] and ``.bias``: e2e_sae's names."""
        return (Linear(self.W_enc, self.b_enc),)

    @property
    def decoder(self) -> Linear:
        """``sae.decoder.weight`` [d_in, d_sae] (raw, not normalised) and ``.bias``: e2e_sae's names."""
        return Linear(self.W_dec.T, self.b_dec)

    def extra_repr(self) -> str:
        parts = [f"d_in={self.d_in}, d_sae={self.d_sae}"]
        if self.activation != resolve_activation(None, self.k):
            parts.append(f"activation={self.activation}")
        parts += [f"k={self.k}"] if self.k else []
        return ", ".join(parts if self.normalize_decoder else [*parts, "normalize_decoder=False"])

    @property
    def settings(self) -> dict[str, Any]:
        """What `SAE` and the configuration's ``saes`` take to make another one of this kind."""
        names = ("k", "activation", "normalize_decoder", "bandwidth")
        return {name: getattr(self, name) for name in names}


def _check_width(name: str, tensor: Tensor, size: str, expected: int) -> None:
    if not isinstance(tensor, Tensor) or tensor.shape[-1:] != (expected,):
        came = list(tensor.shape) if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
        raise ValueError(f"{name} must be a tensor [..., {size}] with {size} = {expected}, got {came}")


class _Rounded(torch.autograd.Function):
    """A parameter's rounded copy in place of a cast of it: same number, same gradient."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, rounded: Tensor) -> Tensor:
        ctx.dtype = parameter.dtype
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].to(ctx.dtype), None


def resolve_activation(activation: Activation | None, k: int | None) -> Activation:
    """The activation: None is TopK with ``k`` and ReLU without. Raises ValueError where name and k disagree."""
    if activation is None:
        return "relu" if k is None else "topk"
    if activation not in get_args(Activation):
        raise ValueError(f"activation must be one of {', '.join(get_args(Activation))}, got {activation!r}")
    if (k is None) != (activation in ("relu", "jump_relu")):
        raise ValueError(f"k belongs to topk and batch_topk, got k={k} with activation {activation!r}")
    return activation


SAE_OPTIONS = ("k", "activation", "normalize_decoder", "threshold", "bandwidth")
"""Arguments of `SAE` that a configuration's ``saes`` may hold."""


E2E_SAE_KEYS = {
    "encoder.0.weight": "W_enc",
    "encoder.0.bias": "b_enc",
    "decoder.weight": "W_dec",
    "decoder.bias": "b_dec",
}
"""e2e_sae's names of an SAE's tensors; its decoder is stored transposed, [d_in, d_sae]."""

OWN_KEYS = {"jump_relu": ("log_threshold",), "batch_topk": ("running_threshold",)}
"""What activations that e2e_sae does not have store beside them, under the same prefix and our own names:
``blocks-6-hook_resid_pre.log_threshold`` [d_sae], ``….running_threshold`` []."""


def tensor_names(sae: SAE) -> dict[str, str]:
    """Name in a file → attribute, for all tensors of an SAE."""
    return E2E_SAE_KEYS | {name: name for name in OWN_KEYS.get(sae.activation, ())}


def to_e2e_sae(saes: Mapping[str, SAE]) -> dict[str, Tensor]:
    """The weights of several SAEs under e2e_sae's keys (``blocks-6-hook_resid_pre.encoder.0.weight`` …; `OWN_KEYS`)."""
    state = {}
    for position, sae in saes.items():
        for theirs, ours in tensor_names(sae).items():
            tensor = getattr(sae, ours).detach()
            state[f"{hyphenated(position)}.{theirs}"] = tensor.T.contiguous() if ours == "W_dec" else tensor
    return state


def load_e2e_sae(saes: Mapping[str, SAE], state: Mapping[str, Tensor], *, strict: bool = True) -> list[str]:
    """Copies weights with e2e_sae's keys into SAEs; returns the positions that were covered.

    Raises ValueError for an unknown key, a tensor of another shape and, when ``strict``, a missing one.
    """
    wanted = {
        f"{hyphenated(position)}.{theirs}": (position, ours)
        for position, sae in saes.items()
        for theirs, ours in tensor_names(sae).items()
    }
    if unknown := sorted(set(state) - set(wanted)):
        raise ValueError(
            f"weights hold {unknown[0]!r}, which no SAE here has; expected keys like {next(iter(wanted))!r}"
        )
    if strict and (missing := sorted(set(wanted) - set(state))):
        raise ValueError(f"weights lack {missing[0]!r} ({len(missing)} keys are missing)")
    covered: dict[str, None] = {}
    with torch.no_grad():
        for key, tensor in state.items():
            position, ours = wanted[key]
            parameter = getattr(saes[position], ours)
            tensor = tensor.T if ours == "W_dec" else tensor
            if tensor.shape != parameter.shape:
                raise ValueError(
                    f"{key} has shape {list(tensor.shape)} ({ours}), the SAE at {position} needs "
                    f"{list(parameter.shape)}: the weights are of another model, position or dictionary size"
                )
            parameter.copy_(tensor)
            covered[position] = None
    return list(covered)
