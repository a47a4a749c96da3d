"""A frozen language model, cut at any point of its residual stream.

An end-to-end loss compares the model with itself, once with an activation replaced. With blocks f_0 … f_{L-1}, final
norm ν and a cut before block ℓ:

    original   x_ℓ = f_{ℓ-1} ∘ … ∘ f_0 (embed(tokens)),   h = ν ∘ f_{L-1} ∘ … ∘ f_ℓ (x_ℓ)      once, no graph
    spliced    h' = ν ∘ f_{L-1} ∘ … ∘ f_ℓ (x̂),            x̂ = SAE(x_ℓ)                          with a graph
    KL         mean over tokens of KL(softmax(U h + b) ‖ softmax(U h' + b))                       kernels.linear_kl

The prefix is never run twice and no logits are built. Any training loop becomes end-to-end with four lines
(``docs/own_loop.py`` is the runnable version)::

    original = lm.original(tokens, at="blocks.6.hook_resid_pre", downstream=["blocks.8.hook_resid_pre"])
    x_hat = sae(original["blocks.6.hook_resid_pre"])
    spliced = original.splice(x_hat)
    loss = spliced.kl() + spliced.mse("blocks.8.hook_resid_pre") + sparsity

Blocks are the model's own modules, called with the arguments that the model itself would pass (masks, rotary tables):
the embedding part of the model runs with every block replaced by one that writes its arguments down. Those depend on
the shape of the batch alone, so they are made once a shape.

An LM is a tree of modules of its own, which shares the given model's weight storage: nothing is written to the user's
model, no hook is left on it, and its training mode and ``requires_grad`` flags stay as they are.

>>> import torch, transformers
>>> config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50, n_positions=32)
>>> lm = load_lm(transformers.GPT2LMHeadModel(config))
>>> lm
LM(gpt2, 2 layers, d_model 16, d_vocab 50, n_ctx 32, processing transformer_lens)
>>> original = lm.original(torch.randint(50, (4, 8)), at="blocks.1.hook_resid_pre")
>>> x = original["blocks.1.hook_resid_pre"]
>>> round(float(original.splice(x).kl()), 6)
0.0
"""

import contextlib
import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from e2e_fast.compiled import CompiledBlocks
from e2e_fast.cpu_blocks import speed_up, whole_block
from e2e_fast.lm_architectures import centre_unembedding, centre_writers, take_apart
from e2e_fast.lm_blocks import (
    STAGES,
    Call,
    Left,
    Notes,
    NoteTaker,
    Replacement,
    Visit,
    blocks_needed,
    leave,
    listen,
    main_output,
    parse_position,
    positions_of,
    same_arguments,
)
from e2e_fast.lm_loading import ALIASES, from_pretrained, front_configs, load_tokenizer, source_of
from e2e_fast.lm_passes import Original, Spliced, share_kl
from e2e_fast.measure import Timings
from e2e_fast.precision import Rounded

__all__ = ["ALIASES", "LM", "PROCESSINGS", "Original", "Replacement", "Spliced", "Unembedding", "load_lm", "share_kl"]

PROCESSINGS = ("transformer_lens", "none")

KNOWN_SHAPES = 4
"""Batch shapes whose block arguments are kept (training and evaluation, each with a last smaller batch)."""


def load_lm(
    model: Any,
    processing: str | None = None,
    device: str | torch.device | None = None,
    *,
    dtype: torch.dtype | None = None,
    tokenizer: Any = None,
    compile: bool = False,
) -> "LM":
    """A frozen LM from anything that holds one.

    model: a Hugging Face name or folder (loaded in float32 unless ``dtype`` says otherwise), "embedded" (the model that
    the demo runs on), a Hugging Face causal LM, a TransformerLens ``TransformerBridge`` (3.x, 4.x) or
    ``HookedTransformer`` (below 4), or an ``LM`` (returned as it is). processing: "transformer_lens", the default,
    gives the activations and logits of TransformerLens' processed models: LayerNorm models have the weights that write
    to the residual stream centred, and models without a logit soft-cap their unembedding centred over the vocabulary.
    "none" leaves the model as it came. ``device=None`` leaves it where it is; ``tokenizer`` overrides the one found
    beside the model. ``compile`` runs its blocks through torch.compile (`LM.compile`).

    Raises ValueError for an unknown architecture, processing or kind of object, FileNotFoundError where a path (a
    ``Path``, or a name that can only be one) leads to no saved model.

    A path that ends in ``.pt`` is a HookedTransformer that e2e_sae trained (``tlens_model_path``; needs TransformerLens
    3): it is run as it is under either processing, as e2e_sae does.
    """
    if processing not in (None, *PROCESSINGS):
        raise ValueError(f"processing must be one of {PROCESSINGS}, got {processing!r}")
    if isinstance(model, str | os.PathLike) and str(model).endswith(".pt"):
        model, dtype = _of_e2e_sae(Path(model), processing or "transformer_lens", tokenizer, dtype), None
    if isinstance(model, LM):
        if processing not in (None, model.processing):
            raise ValueError(f"processing={processing!r} asked of an LM that was loaded with {model.processing!r}")
        lm = model if device is None else model.to(device)
        return lm.compile() if compile and lm.compiled is None else lm
    source = None
    if isinstance(model, str | os.PathLike):
        source = source_of(model)
        model = from_pretrained(source, dtype or torch.float32)
    elif dtype is not None:
        raise ValueError(f"dtype is for models loaded by name, got {dtype} and a {type(model).__name__}")
    lm = LM(model, processing or "transformer_lens", tokenizer=tokenizer, source=source)
    lm = lm if device is None else lm.to(device)
    return lm.compile() if compile else lm


class LM:
    """A frozen language model in parts: embedding, blocks, final norm, unembedding. Made by :func:`load_lm`.

    Deliberately no ``nn.Module``: a module that holds an LM does not list the LM's weights among its own.
    """

    name: str
    """The name, folder or family that it was loaded from."""
    n_layers: int
    d_model: int
    d_vocab: int
    n_ctx: int
    """Longest sequence, tokens."""
    unembed: "Unembedding"
    processing: str
    """"transformer_lens" or "none"."""
    compiled: CompiledBlocks | None
    """The blocks behind torch.compile, with counts of its graphs and their runs; None without `compile`."""

    def __init__(self, model: Any, processing: str, tokenizer: Any = None, source: str | None = None) -> None:
        parts = take_apart(model)
        config = self.config = parts.config
        self.processing = processing
        self._architecture = parts.architecture
        self._parallel = parts.parallel
        self._is_hooked = parts.family == "HookedTransformer"
        self._tokenizer = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
        self._source = source or getattr(config, "_name_or_path", None) or None
        self.name = self._source or getattr(config, "model_name", None) or parts.family
        self.d_vocab, self.d_model = parts.weight.shape
        self.n_ctx = config.n_ctx if self._is_hooked else config.max_position_embeddings

        front, blocks, norm = parts.base, parts.base.get_submodule(parts.architecture.blocks), parts.norm
        weight, bias = parts.weight, parts.bias
        if processing == "transformer_lens":
            if parts.has_layer_norm:
                centre_writers(front, blocks, parts.architecture)
            if parts.softcap is None:
                weight, bias = centre_unembedding(weight, bias)
        self.unembed = Unembedding(weight, bias, parts.softcap)
        self._mode = speed_up(blocks)

        # The front keeps the embedding and all that the model computes before its blocks; there, blocks take notes.
        self._notes = Notes()
        front.set_submodule(parts.architecture.blocks, nn.ModuleList(NoteTaker(self._notes, b) for b in blocks))
        front.set_submodule(parts.architecture.norm, nn.Identity())
        self._front, self._norm, self._blocks = front, norm, list(blocks)
        self._known_calls: dict[tuple[Any, ...], list[Call]] = {}
        if not self._is_hooked:
            self._configs = front_configs(front.config)
        self._modules = nn.ModuleList([front, *blocks, norm, self.unembed]).eval()
        self.n_layers = len(self._blocks)
        self._order = positions_of(self.n_layers, self._parallel)
        self.compiled = None
        self._embeddings: list[Any] | None = None
        self._widths = self._probe()

    # --------------------------------------------------------------------------------------------------- what it is

    def __repr__(self) -> str:
        return (
            f"LM({self.name}, {self.n_layers} layers, d_model {self.d_model}, d_vocab {self.d_vocab}, "
            f"n_ctx {self.n_ctx}, processing {self.processing})"
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.unembed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The floating type of the weights and activations."""
        return self.unembed.weight.dtype

    def to(self, device: str | torch.device) -> "LM":
        """Moves this LM (never the model that it was made from) and returns it."""
        self._modules.to(device)
        self._known_calls.clear()
        if self.compiled is not None:
            self.compile(self.compiled.backend)
        if self._is_hooked:
            self.config.device = str(torch.device(device))
        return self

    def compile(self, backend: str = "inductor") -> "LM":
        """Runs whole blocks through torch.compile from now on, and returns this LM.

        A block with a position inside it (``hook_mlp_out`` …) runs in parts, which are not compiled. Nothing runs
        uncompiled without an error: see `e2e_fast.compiled`. Graphs are made when a batch first needs them.
        """
        self.compiled = CompiledBlocks(self._blocks, backend)
        return self

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer that lies beside the model, loaded on first use; None where there is none."""
        if self._tokenizer is None and self._source is not None:
            self._tokenizer, self._source = load_tokenizer(self._source), None
        return self._tokenizer

    def positions(self) -> list[str]:
        """Every position that can be read and spliced, in the order of the network."""
        return list(self._order)

    def width(self, position: str) -> int:
        """Number of channels at a position: d_model, or d_mlp at ``mlp.hook_pre`` and ``mlp.hook_post``."""
        return self._widths[parse_position(self.check_position(position))[1]]

    def block_weights(self, layer: int) -> int:
        """Entries of all matrices of a block: half the FLOP that its products need for a token."""
        return sum(p.numel() for p in self._blocks[layer].parameters() if p.ndim >= 2)

    def check_position(self, position: str) -> str:
        """The position itself; raises ValueError, with near names, where the model lacks it."""
        if position in self._order:
            return position
        near = difflib.get_close_matches(str(position), self._order, n=3)
        hint = f"near: {', '.join(near)}" if near else f"there are {', '.join(self.positions()[:7])}, …"
        if "hook_resid_mid" in str(position) and self._parallel:
            hint = f"attention and MLP run in parallel, so there is no hook_resid_mid; {hint}"
        raise ValueError(f"position {position!r} is not in {self.name} ({self.n_layers} layers); {hint}")

    def check_tokens(self, tokens: Tensor) -> None:
        """Raises ValueError unless tokens is [B, T] of integers in [0, d_vocab), 1 ≤ T ≤ n_ctx. Waits for CUDA."""
        self._check_shape(tokens)
        low, high = (int(v) for v in tokens.aminmax())
        if low < 0 or high >= self.d_vocab:
            expected = f"[0, {self.d_vocab}) (the vocabulary of {self.name})"
            raise ValueError(f"tokens must lie in {expected}, got ids from {low} to {high}")

    def _check_shape(self, tokens: Tensor) -> None:
        if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.numel() == 0:
            came = list(tokens.shape) if isinstance(tokens, Tensor) else f"a {type(tokens).__name__}"
            raise ValueError(f"tokens must be a tensor [batch, sequence] that is not empty, got {came}")
        if tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"tokens must be int64 or int32, got {tokens.dtype}")
        if tokens.shape[1] > self.n_ctx:
            raise ValueError(f"tokens must be at most n_ctx = {self.n_ctx} long, got sequences of {tokens.shape[1]}")

    # ----------------------------------------------------------------------------------------------- the two passes

    @torch.no_grad()
    def original(
        self,
        tokens: Tensor,
        at: str | Iterable[str] = (),
        downstream: str | Iterable[str] = (),
        suffix: bool = True,
        timings: Timings | None = None,
        *,
        fast: bool = False,
    ) -> Original:
        """The unchanged model on tokens [B, T], once and without a graph.

        at: position or positions that a splice will replace; downstream: positions to compare. Both can be read from
        the result. ``suffix=False`` stops after the last of them, for training that needs no output of the model.
        ``timings`` receives the seconds of the prefix, up to the first replaced position, and of the teacher after it.
        ``fast`` lets this pass and its splices use our own attention, GELU and products on a CPU in float32
        (`e2e_fast.cpu_blocks`), as training does: about twice as fast, and the model's numbers to rounding only.

        Ids are compared with the vocabulary on the CPU only: a CUDA tensor would have to be waited for, so check it
        once with :meth:`check_tokens`.
        Raises ValueError for unknown positions and for tokens of wrong shape, type, length or range.
        """
        at = [at] if isinstance(at, str) else list(at)
        downstream = [downstream] if isinstance(downstream, str) else list(downstream)
        named = sorted({self.check_position(p) for p in (*at, *downstream)}, key=self._order.__getitem__)
        self._check_shape(tokens)
        if tokens.device.type == "cpu":
            self.check_tokens(tokens)

        wanted = set(named)
        for layer, stage in map(parse_position, at):
            if stage in STAGES[1:-1]:  # a splice inside a block goes on from these
                wanted |= {f"blocks.{layer}.hook_resid_pre", f"blocks.{layer}.hook_attn_out"}
        stop = self.n_layers if suffix else max(map(blocks_needed, wanted), default=0)

        cut = min([stop, *map(blocks_needed, at)]) if suffix else stop

        timings, visit = timings or Timings(enabled=False), Visit(wanted)
        with timings.phase("prefix"), self._mode.set(fast):
            x, calls = self._embed(tokens.to(self.device, non_blocking=True))
            x = self._advance(visit("blocks.0.hook_resid_pre", x), calls, 0, cut, visit)
        with timings.phase("teacher") if suffix else contextlib.nullcontext(), self._mode.set(fast):
            x = self._advance(x, calls, cut, stop, visit)
            final = self._norm(x) if suffix else None
        return Original(self, tokens, at, named, visit.seen, calls, final, fast)

    def _embed(self, tokens: Tensor) -> tuple[Tensor, list[Call]]:
        """The stream before block 0, [B, T, D], and the arguments that each block is called with."""
        self._notes.calls = []
        if self._is_hooked:  # its masks may depend on the tokens (left padding)
            return self._front(tokens, return_type=None, stop_at_layer=self.n_layers), self._notes.calls
        # Tensors made in inference mode cannot serve a graph later on.
        batch = (*tokens.shape, torch.is_inference_mode_enabled())
        calls = self._known_calls.get(batch)
        if calls is not None and self._embeddings is not None:
            return self._sum_of_embeddings(tokens), calls
        self._front.config = self._configs.masks if calls is None else self._configs.no_masks
        plain = {"use_cache": False, "output_attentions": False, "output_hidden_states": False}
        x = self._front(tokens, return_dict=True, **plain).last_hidden_state
        if calls is None:
            while len(self._known_calls) >= KNOWN_SHAPES:
                del self._known_calls[next(iter(self._known_calls))]
            calls = self._known_calls[batch] = self._notes.calls
        return x, calls

    def _sum_of_embeddings(self, tokens: Tensor) -> Tensor:
        """What the front computes, where `_probe` found that it does no more: a tenth of its Python."""
        assert self._embeddings is not None
        words, *positions = self._embeddings
        x = words(tokens)
        return x + positions[0].weight[: tokens.shape[1]] if positions else x

    def _advance(self, x: Tensor, calls: list[Call], start: int, stop: int, visit: Visit) -> Tensor:
        """From the stream before block ``start`` to the stream before block ``stop``."""
        for layer in range(start, stop):
            if layer in visit.inside:
                attn_out = visit(f"blocks.{layer}.hook_attn_out", self._attention(layer, x, calls[layer]))
                x = self._after_attention(layer, x, attn_out, visit)
            else:
                x = self._whole_block(layer, x, calls[layer])
            x = self._between(layer, x, visit)
        return x

    def _whole_block(self, layer: int, x: Tensor, call: Call) -> Tensor:
        if self.compiled is not None:
            return main_output(self.compiled(layer, x, *call.args, **call.kwargs))
        block = self._blocks[layer]
        y = whole_block(block, self._mode, x, call.args, call.kwargs)
        return main_output(block(x, *call.args, **call.kwargs)) if y is None else y

    def _between(self, layer: int, x: Tensor, visit: Visit) -> Tensor:
        """Blocks ``layer`` and ``layer + 1`` share one tensor with two names."""
        x = visit(f"blocks.{layer}.hook_resid_post", x)
        return visit(f"blocks.{layer + 1}.hook_resid_pre", x) if layer + 1 < self.n_layers else x

    def _attention(self, layer: int, x: Tensor, call: Call) -> Tensor:
        """The attention branch: the block's own forward, left at the module that yields attn_out."""
        block = self._blocks[layer]
        handle = block.get_submodule(self._architecture.attn_out).register_forward_hook(leave)
        try:
            block(x, *call.args, **call.kwargs)
        except Left as left:
            return left.output
        finally:
            handle.remove()
        raise RuntimeError(f"block {layer} of {self.name} never called its {self._architecture.attn_out}")

    def _after_attention(
        self, layer: int, x: Tensor, attn_out: Tensor, visit: Visit, mlp_out: Tensor | None = None
    ) -> Tensor:
        """The rest of a block, from its input and attn_out (and mlp_out, where it is known) to its output."""
        mid = x + attn_out
        if not self._parallel:
            mid = x = visit(f"blocks.{layer}.hook_resid_mid", mid)
        if mlp_out is None:
            mlp_out = self._mlp(layer, x, visit)
        return mid + visit(f"blocks.{layer}.hook_mlp_out", mlp_out)

    def _mlp(self, layer: int, x: Tensor, visit: Visit) -> Tensor:
        """The MLP branch with its norms, visited at its hidden layer where that is asked for."""
        block = self._blocks[layer]
        taps = {"mlp.hook_pre": self._architecture.mlp_pre, "mlp.hook_post": self._architecture.mlp_post}
        named = {f"blocks.{layer}.{stage}": tap for stage, tap in taps.items()}
        handles = [listen(block, tap, visit, name) for name, tap in named.items() if name in visit.names]
        try:
            for path in self._architecture.mlp:
                x = main_output(block.get_submodule(path)(x))
        finally:
            for handle in handles:
                handle.remove()
        return x

    @torch.no_grad()
    def _probe(self) -> dict[str, int]:
        """Runs two tokens through block 0, whole and in parts: the parts must agree. Returns the stages' widths."""
        x, calls = self._embed(torch.zeros(1, 2, dtype=torch.int64, device=self.device))
        if len(calls) != self.n_layers or x.shape != (1, 2, self.d_model):
            raise ValueError(f"{self.name} does not run its blocks one after the other, as its family should")
        whole = main_output(self._blocks[0](x, *calls[0].args, **calls[0].kwargs))
        if not torch.isfinite(whole).all():
            raise ValueError(f"{self.name} gives NaN or infinity for its first token: its weights are damaged")
        self._known_calls.clear()
        ones, others = self._embed(torch.ones(1, 2, dtype=torch.int64, device=self.device))
        if not all(map(same_arguments, calls, others)):
            raise ValueError(f"{self.name} passes its blocks arguments that depend on the tokens: not supported")
        if not self._is_hooked:
            self._embeddings = [
                self._front.get_submodule(p.removesuffix(".weight")) for p in self._architecture.embeddings
            ]
            if not torch.equal(self._sum_of_embeddings(torch.ones(1, 2, dtype=torch.int64, device=self.device)), ones):
                self._embeddings = None
        visit = Visit(name for name in self._order if name.startswith("blocks.0."))
        parts = self._advance(visit("blocks.0.hook_resid_pre", x), calls, 0, 1, visit)
        if not torch.allclose(whole, parts, rtol=0, atol=2e-2 * float(whole.abs().max())):
            kind = type(self._blocks[0]).__name__
            raise ValueError(f"{self.name}'s blocks ({kind}) do not compute what its family's row in the table says")
        return {parse_position(name)[1]: value.shape[-1] for name, value in visit.seen.items()}


class Unembedding(nn.Module):
    """From the hidden state after the final norm to logits: ``hidden @ weight.T + bias``, soft-capped."""

    weight: Tensor
    """(V, D)."""
    bias: Tensor | None
    """(V,) or None."""
    softcap: float | None
    """c in ``c · tanh(logits / c)`` (Gemma 2), or None."""

    def __init__(self, weight: Tensor, bias: Tensor | None, softcap: float | None) -> None:
        super().__init__()
        # Registered as they come: a parameter that is also the embedding's stays one tensor when the LM moves.
        self.weight, self.bias, self.softcap = weight, bias, softcap
        self._rounded = Rounded()

    def reduced(self) -> Tensor:
        """The weight as operators of ours take it: under autocast a cast copy, kept while the weight stays as it is."""
        return self._rounded(self.weight)

    def exact(self) -> "Unembedding":
        """The same in float32, of a model in half precision; else itself."""
        if self.weight.dtype in (torch.float32, torch.float64):
            return self
        return Unembedding(self.weight.float(), None if self.bias is None else self.bias.float(), self.softcap)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] → logits [..., V]."""
        logits = nnf.linear(hidden, self.weight, self.bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def _of_e2e_sae(path: Path, processing: str, tokenizer: Any, dtype: torch.dtype | None) -> LM:
    """A language model that e2e_sae trained, unprocessed whatever the processing is called."""
    from e2e_fast.formats import lens_checkpoint

    if dtype is not None:
        raise ValueError(f"dtype is for models loaded by name, got {dtype} and {path}, which has its own")
    model, source = lens_checkpoint.read(path)
    lm = LM(model, "none", tokenizer=tokenizer, source=source)
    lm.name, lm.processing = str(path), processing
    return lm
