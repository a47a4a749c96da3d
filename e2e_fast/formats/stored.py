"""An SAE as some library stores it, and its translation into any other arrangement that computes the same function.

With s the input scale, θ the threshold, n_j = ‖W_dec[j]‖ and σ ∈ {relu, top-k, batch top-k, jump-relu}:

    p = W_enc (s·x − [b_dec]) + b_enc          [b_dec] only with ``subtract_b_dec``
    c = σ(p)          x̂ = (Σ_j c_j W_dec[j] + b_dec) / s                            decoder "raw"
    c = σ(p)          x̂ = (Σ_j c_j W_dec[j] / n_j + b_dec) / s                      decoder "unit"
    c = σ(n ⊙ p)      x̂ = (Σ_j c_j W_dec[j] / n_j + b_dec) / s                      decoder "rescaled"

Each difference is absorbed by the weights, in float64, rounded once:

    [b_dec] → b_enc       b_enc ← b_enc − W_enc b_dec
    s → weights           raw: W_enc ← s W_enc, W_dec ← W_dec / s, b_dec ← b_dec / s;   unit: b_enc, θ, b_dec ← · / s
    rescaled → unit       W_enc, b_enc ← n ⊙ ·
    unit → raw            W_dec ← W_dec / n
    raw → unit            W_enc, b_enc, θ ← n ⊙ ·     relu and jump-relu commute with it; a selection of the k largest
                                                      does only when all n_j are equal

>>> import torch
>>> sae = StoredSAE(torch.eye(2), torch.zeros(2), 3 * torch.eye(2), torch.ones(2), subtract_b_dec=True)
>>> x = torch.tensor([[2.0, 0.0]])
>>> sae(x)
tensor([[4., 1.]])
>>> sae.arranged(decoder="unit")(x)
tensor([[4., 1.]])
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import Tensor

if TYPE_CHECKING:
    from e2e_fast.sae import SAE

Activation = Literal["relu", "topk", "batch_topk", "jump_relu"]
Decoder = Literal["raw", "unit", "rescaled"]

BLOCK = 4096
"""Rows that are in float64 at a time."""

UNIFORM = 1e-5
"""Rows whose norms differ by no more than this share count as equal: what unit rows lose by rounding to float32."""


@dataclass(frozen=True, eq=False)
class StoredSAE:
    """One SAE of a file: its weights in one orientation, what is computed with them, and all else the file says."""

    W_enc: Tensor
    """[F, D] in the file's dtype."""
    b_enc: Tensor
    """[F]"""
    W_dec: Tensor
    """[F, D]"""
    b_dec: Tensor
    """[D]"""
    activation: Activation = "relu"
    k: float | None = None
    """Features kept per token (top-k) or per token on average (batch top-k, whose k need not be whole)."""
    threshold: Tensor | None = None
    """[F] or (): jump-relu's θ; batch top-k's θ outside training, None where the file has none."""
    subtract_b_dec: bool = False
    """Whether b_dec is subtracted from the input before encoding."""
    decoder: Decoder = "raw"
    input_scale: float = 1.0
    """Factor on the activations before encoding; the output is divided by it."""
    position: str | None = None
    """TransformerLens name of the activation, as in ``blocks.6.hook_resid_pre``; None where the file does not say."""
    model: str | None = None
    """Name of the language model."""
    lm_processing: str | None = None
    """"transformer_lens" (centred writing weights) or "none" (raw activations); None where the file does not say."""
    format: str = ""
    """Whose layout this is (a name in `e2e_fast.formats.FORMATS`); "" for an SAE that never was a file."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """The file's own settings, verbatim."""
    extra: dict[str, Tensor] = field(default_factory=dict)
    """Tensors beyond those above, under the file's names."""
    files: dict[str, bytes] = field(default_factory=dict)
    """Files that lie beside the weights and travel with them unchanged."""
    refusal: str | None = None
    """Why no SAE of ours computes this function; None where one does."""

    def __post_init__(self) -> None:
        if self.activation not in get_args(Activation):
            raise ValueError(f"activation must be one of {get_args(Activation)}, got {self.activation!r}")
        if self.W_enc.ndim != 2 or self.W_dec.shape != self.W_enc.shape:
            shapes = f"{list(self.W_enc.shape)} and {list(self.W_dec.shape)}"
            raise ValueError(f"W_enc and W_dec must both be [F, D], got {shapes}")
        F, D = self.W_enc.shape
        if self.b_enc.shape != (F,) or self.b_dec.shape != (D,):
            shapes = f"{list(self.b_enc.shape)} and {list(self.b_dec.shape)}"
            raise ValueError(f"b_enc and b_dec must be [{F}] and [{D}], got {shapes}")
        if self.activation in ("topk", "batch_topk") and not (isinstance(self.k, int | float) and 0 < self.k <= F):
            raise ValueError(f"k must lie in [1, {F}] for {self.activation}, got {self.k!r}")
        if self.activation == "topk" and self.k != int(self.k or 0):
            raise ValueError(f"k must be whole for topk, got {self.k}")
        if self.activation == "jump_relu" and self.threshold is None:
            raise ValueError("threshold must be given for jump_relu, got None")
        if self.threshold is not None and self.threshold.shape not in ((), (F,)):
            raise ValueError(f"threshold must be a scalar or [{F}], got {list(self.threshold.shape)}")

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[1]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[0]

    def at(self, position: str | None, model: str | None, lm_processing: str | None) -> "StoredSAE":
        """The same SAE with another place; None leaves what there is."""
        place = {"position": position, "model": model, "lm_processing": lm_processing}
        return dataclasses.replace(self, **{key: value for key, value in place.items() if value is not None})

    # ------------------------------------------------------------------ the function

    def encode(self, x: Tensor) -> Tensor:
        """Codes (N, F) of activations x (N, D), as the file's library computes them outside training."""
        self._check_representable()
        z = x * self.input_scale - (self.b_dec if self.subtract_b_dec else 0)
        p = torch.nn.functional.linear(z.to(self.W_enc.dtype), self.W_enc, self.b_enc)
        if self.decoder == "rescaled":
            p = p * self.W_dec.norm(dim=1)
        if self.activation == "topk":
            assert self.k is not None
            values, indices = p.relu().topk(int(self.k), dim=-1)
            return torch.zeros_like(p).scatter(-1, indices, values)
        if self.activation == "relu":
            return p.relu()
        if self.threshold is None:
            raise ValueError("threshold is None: outside training a batch top-k SAE needs one")
        return p.relu() * (p > self.threshold)

    def decode(self, c: Tensor) -> Tensor:
        """Activations (N, D) of codes (N, F)."""
        W_dec = self.W_dec
        if self.decoder != "raw":
            W_dec = W_dec / row_norms(W_dec).to(W_dec.dtype)[:, None]
        return (c @ W_dec + self.b_dec) / self.input_scale

    def __call__(self, x: Tensor) -> Tensor:
        """Reconstructions (N, D) of activations x (N, D)."""
        return self.decode(self.encode(x))

    # ------------------------------------------------------------------ as an SAE of ours

    def to_sae(self, *, normalize_decoder: bool | None = None) -> "SAE":
        """The same function as a trainable `e2e_fast.SAE`, in float32 (float64 if it was).

        ``normalize_decoder=None``: True wherever that computes the same, since a penalty on codes means something only
        for rows of a fixed norm. Raises ValueError where the function is none of ours (`arranged`), and for a batch
        top-k SAE whose k is not whole.
        """
        from e2e_fast.sae import SAE

        unit = self.can_be_unit() if normalize_decoder is None else normalize_decoder
        plain = self.arranged(decoder="unit" if unit else "raw")
        if plain.k is not None and plain.k != int(plain.k):
            raise ValueError(f"k must be whole, got {plain.k}: SAELens' inference file of this SAE (jumprelu) has none")
        sae = SAE(
            self.d_in,
            self.d_sae,
            k=None if plain.k is None else int(plain.k),
            activation=plain.activation,
            normalize_decoder=unit,
            init="empty",
        ).to(plain.W_enc.dtype)
        with torch.no_grad():
            for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
                getattr(sae, name).copy_(getattr(plain, name))
            if self.activation == "jump_relu":
                sae.log_threshold.copy_(log_threshold(plain))
            elif self.activation == "batch_topk" and plain.threshold is not None:
                sae.running_threshold.copy_(plain.threshold.clamp(min=0))
        return sae

    @classmethod
    def of(
        cls,
        sae: "SAE",
        *,
        position: str | None = None,
        model: str | None = None,
        lm_processing: str | None = None,
    ) -> "StoredSAE":
        """An SAE of ours, and where it sits."""
        thresholds = sae.thresholds
        if thresholds is not None:
            thresholds = thresholds.detach().cpu()
            thresholds = thresholds[0].clone() if sae.activation == "batch_topk" else thresholds
        weights = (tensor.detach().cpu() for tensor in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec))
        return cls(
            *weights,
            activation=cast(Activation, sae.activation),
            k=sae.k,
            threshold=thresholds,
            decoder="unit" if sae.normalize_decoder else "raw",
            position=position,
            model=model,
            lm_processing=lm_processing,
        )

    # ------------------------------------------------------------------ the same function, arranged otherwise

    def arranged(self, *, subtract_b_dec: bool = False, decoder: Decoder | None = None) -> "StoredSAE":
        """The same function with input scale 1 and the given arrangement; ``decoder=None``: "unit" stays, else "raw".

        Weights become float32, or float64 if they were. What needs no change keeps its bits. Codes keep their values,
        but for a positive factor per feature where norms or scales move between encoder and decoder.

        Raises ValueError when the file's function is none of ours, and for decoder="unit" when rows of unequal norms
        meet a selection of the k largest.
        """
        self._check_representable()
        if decoder == "rescaled":
            raise ValueError("decoder must be 'raw' or 'unit' (no arrangement needs 'rescaled'), got 'rescaled'")
        decoder = decoder or ("raw" if self.decoder == "raw" else "unit")
        dtype = torch.promote_types(self.W_enc.dtype, torch.float32)
        norms, s = row_norms(self.W_dec), self.input_scale
        one = torch.ones_like(norms)
        # Factors, per feature, of the rows of W_enc, of b_enc, of θ and of the rows of W_dec.
        enc, bias, theta, dec = one, one, one, one
        if self.decoder == "rescaled":
            scale = torch.where(self.W_dec.any(dim=1), norms, 0.0)
            enc, bias = enc * scale, bias * scale
        if self.decoder == "raw":
            enc, dec, norms = enc * s, dec / s, norms / s
        else:
            bias, theta = bias / s, theta / s
        if self.decoder == "raw" and decoder == "unit":
            self._check_uniform(norms)
            enc, bias, theta = enc * norms, bias * norms, theta * norms
        elif self.decoder != "raw" and decoder == "raw":
            dec = dec / norms

        # W_enc b_dec enters b_enc with 1/s where it shall be subtracted, and leaves it where it was.
        share = enc * (subtract_b_dec / s) - bias * self.subtract_b_dec
        b_enc = self.b_enc.detach().double() * bias
        if bool(share.any()):
            b_enc = b_enc + share * _by_blocks(lambda rows: rows @ self.b_dec.detach().double(), self.W_enc)
        threshold = None if self.threshold is None else self.threshold.detach().double()
        if threshold is not None:
            # One threshold stays one: batch top-k meets equal factors alone.
            threshold = threshold * (theta.mean() if self.activation == "batch_topk" else theta)
        return dataclasses.replace(
            self,
            W_enc=_scaled(self.W_enc, enc, dtype),
            b_enc=b_enc.to(dtype),
            W_dec=_scaled(self.W_dec, dec, dtype),
            b_dec=(self.b_dec.detach().double() / s).to(dtype),
            threshold=None if threshold is None else threshold.to(dtype),
            subtract_b_dec=subtract_b_dec,
            decoder=decoder,
            input_scale=1.0,
        )

    def can_be_unit(self) -> bool:
        """Whether `arranged` has a decoder="unit" for this SAE."""
        return self.decoder != "raw" or self.activation in ("relu", "jump_relu") or _uniform(row_norms(self.W_dec))

    def _check_uniform(self, norms: Tensor) -> None:
        if self.activation in ("topk", "batch_topk") and not _uniform(norms):
            raise ValueError(
                f"decoder rows have norms from {float(norms.min()):.4g} to {float(norms.max()):.4g}: normalising them "
                f"would change which features {self.activation} selects; keep the decoder raw (normalize_decoder=False)"
            )

    def _check_representable(self) -> None:
        if self.refusal is not None:
            raise ValueError(self.refusal)


def log_threshold(sae: StoredSAE) -> Tensor:
    """[F] log θ of a jump-relu SAE; below the smallest normal number θ makes no difference and its log stays finite."""
    assert sae.threshold is not None
    return sae.threshold.clamp(min=torch.finfo(torch.float32).tiny).log().expand(sae.d_sae).clone()


def row_norms(W_dec: Tensor) -> Tensor:
    """[F] norms of the decoder's rows in float64; a zero row, which contributes nothing, has the mean of the others."""
    norms = _by_blocks(lambda rows: rows.norm(dim=1), W_dec)
    used = norms > 0
    mean = norms.sum() / used.sum() if bool(used.any()) else torch.ones_like(norms[0])
    return torch.where(used, norms, mean)


def _by_blocks(function: Callable[[Tensor], Tensor], matrix: Tensor) -> Tensor:
    """``function`` of a matrix [F, D] in float64, block of rows by block of rows."""
    return torch.cat([function(rows.double()) for rows in matrix.detach().split(BLOCK)])


def _scaled(matrix: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``factor[:, None] * matrix`` in float64, rounded once to ``dtype``; its own bits where every factor is 1."""
    if bool((factor == 1).all()):
        return matrix.detach().to(dtype)
    scaled = torch.empty_like(matrix, dtype=dtype)
    for rows, of, by in zip(scaled.split(BLOCK), matrix.detach().split(BLOCK), factor.split(BLOCK), strict=True):
        rows.copy_(of.double() * by[:, None])
    return scaled


def _uniform(norms: Tensor) -> bool:
    return bool(norms.max() - norms.min() <= UNIFORM * norms.mean())
