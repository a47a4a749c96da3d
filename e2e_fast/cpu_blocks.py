"""A frozen model's blocks on a CPU in float32, with this library's operators in torch's place.

    attention      kernels.attention, in place of SDPA, Gemma 2's and GPT-Neo's own, under causal masks and windows
    GELU           kernels.gelu: transformers composes GPT-2's of seven operations, and torch is slow at it
    linear layers  oneDNN's product, which on AMD processors is faster than MKL's; no gradient of a weight is prepared

    whole blocks   GPT-2's and GPT-Neo's up to WIDEST channels, where no graph is recorded: attention and a few times
                   kernels.branch (norm, layers, GELU and sum in one pass), instead of a dozen of torch's operators

The numbers are the model's to float32 rounding, so these parts work only in passes that ask for it (`Mode.fast`): else,
on a GPU, in other dtypes and under autocast each part does what the model's own did. One thing is saved there too:
autocast would round a layer's frozen weight anew in every pass. Inside torch.compile products and GELU are left to the
compiler. `speed_up` changes modules in place: it is for the tree of modules that an LM has for itself, never for a
user's model.

>>> import torch
>>> block = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 4)).requires_grad_(False)
>>> x, y = torch.ones(4), block(torch.ones(4))
>>> mode = speed_up([block])
>>> torch.equal(block(x), y)
True
>>> with mode.set(fast=True):
...     torch.allclose(block(x), y)
True
"""

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from e2e_fast import kernels
from e2e_fast.kernels import reference
from e2e_fast.kernels._gemm import frozen_linear
from e2e_fast.kernels.branch import Layer, Norm
from e2e_fast.precision import Rounded

ATTENTION = "e2e_fast"
"""Our entry in transformers' table of attention functions."""

MODE = "e2e_fast_mode"
"""Attribute of an attention module that holds its model's `Mode`."""

USUAL = "e2e_fast_usual"
"""Attribute of an attention module that holds the function which it calls by default, where that is not SDPA."""

GELUS = {
    "NewGELUActivation": "tanh",
    "FastGELUActivation": "tanh",
    "GELUTanh": "tanh",
    "PytorchGELUTanh": "tanh",
    "GELUActivation": "none",
}
"""transformers' modules → the form of GELU that each computes."""

CHANGES = ("position_bias", "cache", "head_mask", "s_aux")
"""Arguments of attention functions that change what is computed."""

EAGER = ("Gemma2Attention",)
"""Attention whose eager form, which it has by default for its soft cap, is ours too. Elsewhere eager was asked for."""

WIDEST = 256
"""Blocks with more channels have products that oneDNN does faster than `kernels.branch`."""

_WINDOWS: MutableMapping[Tensor, int] = WeakTensorKeyDictionary()
"""Attention masks that have been read → the window that they stand for, tokens; 0 where they are of another kind."""


class Mode:
    """Whether the parts of one model's blocks are fast at present."""

    fast: bool = False

    @contextmanager
    def set(self, fast: bool) -> Iterator[None]:
        """``fast`` while the context lasts."""
        before, self.fast = self.fast, fast
        try:
            yield
        finally:
            self.fast = before


def speed_up(blocks: Iterable[nn.Module]) -> Mode:
    """Puts parts that can be fast in the place of a frozen model's own, in place; unknown ones stay as they are."""
    mode, configs = Mode(), dict[int, Any]()
    for block in blocks:
        for module in list(block.modules()):
            for name, child in module.named_children():
                if (part := _part(child, mode)) is not None:
                    setattr(module, name, part)
            config, kind = vars(module).get("config"), type(module).__name__
            usual = "eager" if kind in EAGER else "sdpa"
            if config is not None and getattr(config, "_attn_implementation", None) == usual:
                if id(config) not in configs:
                    configs[id(config)] = _with_our_attention(config)
                module.config = configs[id(config)]
                vars(module)[MODE] = mode
                if kind in EAGER:
                    vars(module)[USUAL] = sys.modules[type(module).__module__].eager_attention_forward
            if kind == "GPTNeoSelfAttention":
                attention: Any = module
                attention._attn = partial(_attend_as_gpt_neo, module, mode, attention._attn)
    return mode


def _part(module: Any, mode: Mode) -> nn.Module | None:
    """What stands for a module, if anything does."""
    kind = type(module)
    if kind is nn.Linear:
        return Linear(module.weight, module.bias, False, mode)
    if kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers."):
        return Linear(module.weight, module.bias, True, mode)
    if kind is nn.GELU:
        return GELU(module.approximate, mode)
    if kind.__name__ in GELUS and kind.__module__.startswith("transformers."):
        return GELU(GELUS[kind.__name__], mode)
    return None


def _is_float32_on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


def _applies(mode: Mode, x: Tensor) -> bool:
    """Where products and activations are ours: torch.compile fuses them with what is around them."""
    return mode.fast and _is_float32_on_cpu(x) and not torch.compiler.is_compiling()


class Linear(nn.Module):
    """``x @ weight.T + bias``; weight (F, D), or (D, F) where it is stored ``transposed`` (GPT-2's Conv1D)."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, transposed: bool, mode: Mode) -> None:
        super().__init__()
        self.weight, self.bias, self.transposed, self.mode = weight, bias, transposed, mode
        self._rounded = Rounded(), Rounded()

    @property
    def layer(self) -> Layer:
        """The weight as (F, D), and the bias."""
        return Layer(self.weight.t() if self.transposed else self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, D) → (…, F)."""
        if _applies(self.mode, x) and not self.weight.requires_grad:
            return frozen_linear(x, *self.layer)
        weight, bias = self.weight, self.bias
        if weight.dtype == torch.float32 and not weight.requires_grad and not torch.compiler.is_compiling():
            weight, bias = self._rounded[0](weight), None if bias is None else self._rounded[1](bias)
        if self.transposed and bias is not None:  # as Conv1D does
            return torch.addmm(bias, x.view(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)
        return nnf.linear(x, weight.t() if self.transposed else weight, bias)


class GELU(nn.GELU):
    """torch's module (transformers spells the tanh form out in seven operations), in fast passes `kernels.gelu`."""

    def __init__(self, approximate: str, mode: Mode) -> None:
        super().__init__(approximate)
        self.mode = mode

    def forward(self, input: Tensor) -> Tensor:
        if _applies(self.mode, input):
            return kernels.gelu(input, self.approximate)
        return super().forward(input)


# --- Whole blocks ---------------------------------------------------------------------------------------------------


class Parts(NamedTuple):
    """A block ``x + out(attention(qkv(norm(x))))``, then ``x + down(gelu(up(norm(x))))``."""

    attention_norm: Norm
    qkv: tuple[Layer, ...]
    """One layer, or one each."""
    heads: int
    scale: float
    window: int | None
    out: Layer
    mlp_norm: Norm
    up: Layer
    gelu: str
    down: Layer


def whole_block(
    block: nn.Module, mode: Mode, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """A block's output by a few operators, without a graph; None where it must be run as it is."""
    if not (mode.fast and x.shape[-1] <= WIDEST and _applies(mode, x)) or (x.requires_grad and torch.is_grad_enabled()):
        return None
    if (read := PARTS.get(type(block).__name__)) is None or not _is_causal(x.shape[1], args, kwargs):
        return None
    if (parts := read(block)) is None:
        return None
    B, T, D = x.shape
    with torch.no_grad():
        stream = x.reshape(B * T, D)
        qkv = [kernels.branch(stream, layer, norm=parts.attention_norm) for layer in parts.qkv]
        queries, keys, values = qkv if len(qkv) == 3 else qkv[0].split(D, dim=1)
        q, k, v = (y.view(B, T, parts.heads, -1).transpose(1, 2) for y in (queries, keys, values))
        attended = kernels.attention(q, k, v, scale=parts.scale, window=parts.window).view(B * T, D)
        stream = kernels.branch(attended, parts.out, residual=stream)
        stream = kernels.branch(
            stream, parts.up, norm=parts.mlp_norm, gelu=parts.gelu, second=parts.down, residual=stream
        )
    return stream.view(B, T, D)


def _is_causal(tokens: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a block's arguments say no more than that each token attends to those before it."""
    rest = [*args, *(value for name, value in kwargs.items() if name not in ("attention_mask", "position_ids"))]
    says_nothing = all(value is None or value is False for value in rest)
    return says_nothing and _window(kwargs.get("attention_mask"), tokens, None) == tokens


def _gpt2(block: Any) -> Parts | None:
    attention = block.attn
    # transformers 4 has no ``scaling``: there the block is run in parts.
    if MODE not in vars(attention) or not hasattr(attention, "scaling") or not isinstance(block.mlp.act, GELU):
        return None
    return Parts(
        _norm(block.ln_1), (attention.c_attn.layer,), attention.num_heads, attention.scaling, None,
        attention.c_proj.layer, _norm(block.ln_2), block.mlp.c_fc.layer, block.mlp.act.approximate,
        block.mlp.c_proj.layer,
    )  # fmt: skip


def _gpt_neo(block: Any) -> Parts | None:
    attention = block.attn.attention
    if not isinstance(block.mlp.act, GELU):
        return None
    return Parts(
        _norm(block.ln_1), (attention.q_proj.layer, attention.k_proj.layer, attention.v_proj.layer),
        attention.num_heads, 1.0, attention.config.window_size if attention.attention_type == "local" else None,
        attention.out_proj.layer, _norm(block.ln_2), block.mlp.c_fc.layer, block.mlp.act.approximate,
        block.mlp.c_proj.layer,
    )  # fmt: skip


def _norm(module: Any) -> Norm:
    return Norm(module.weight, module.bias, module.eps)


PARTS: dict[str, Callable[[Any], Parts | None]] = {"GPT2Block": _gpt2, "GPTNeoBlock": _gpt_neo}
"""Blocks that are run as a whole."""


# --- Attention ------------------------------------------------------------------------------------------------------


def _with_our_attention(config: Any) -> Any:
    """A copy that names our attention function; registers it with transformers on the way."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if ATTENTION not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS[ATTENTION] = _attend
    ours = copy.copy(config)
    ours._attn_implementation = ATTENTION
    return ours


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: ours where it computes the same, else the model's."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    # A mask says all: transformers 4 calls what it masks not causal.
    causal = attention_mask is not None or (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    plain = dropout == 0 and causal and all(options.get(name) is None for name in CHANGES)
    mode: Mode | None = vars(module).get(MODE)
    if mode is not None and mode.fast and plain and _fits(query, key, value):
        window = _window(attention_mask, query.shape[2], options.get("sliding_window"))
        if window:
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            softcap = options.get("softcap")
            return kernels.attention(query, key, value, scale=scale, window=window, softcap=softcap), None
    options |= {"dropout": dropout, "scaling": scaling}
    if (eager := vars(module).get(USUAL)) is not None:
        return eager(module, query, key, value, attention_mask, **options)
    sdpa: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]
    return sdpa(module, query, key, value, attention_mask, is_causal=is_causal, **options)


def _attend_as_gpt_neo(
    module: nn.Module,
    mode: Mode,
    usual: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *rest: Any,
) -> tuple[Tensor, Any]:
    """GPT-Neo's ``_attn``: scores are not scaled, every other block has a window. Returns heads before tokens.

    ``rest`` is a head mask in transformers 4.
    """
    dropout: Any = module.attn_dropout
    plain = not (dropout.training and dropout.p) and all(value is None for value in rest)
    if mode.fast and plain and _fits(query, key, value):
        tokens, config = query.shape[2], vars(module)["config"]
        if _window(attention_mask, tokens, None) == tokens:
            window = config.window_size if vars(module)["attention_type"] == "local" else None
            return kernels.attention(query, key, value, scale=1.0, window=window).transpose(1, 2), None
    return usual(query, key, value, attention_mask, *rest)


def _fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    return query.shape[2:] == key.shape[2:] and key.shape == value.shape and _is_float32_on_cpu(query)


def _window(mask: Tensor | None, tokens: int, window: int | None) -> int:
    """How many tokens a mask lets each token see: all before it, or ``window``; 0 where it is another mask."""
    if mask is None:  # SDPA is causal then, whatever the window
        return tokens
    if torch.compiler.is_compiling():
        return 0
    if mask not in _WINDOWS:
        seen = mask if mask.dtype == torch.bool else mask == 0
        known = (w for w in (tokens, window) if w and (seen == reference.seen_keys(tokens, w, mask.device)).all())
        _WINDOWS[mask] = next(known, 0) if mask.shape[-2:] == (tokens, tokens) else 0
    return _WINDOWS[mask]
