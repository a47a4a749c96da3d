"""A frozen language model, cut at any point of its residual stream.

An end-to-end loss compares the model with itself, once with an activation replaced. With blocks f_0 … f_{L-1}, final norm
ν and a cut before block ℓ:

    original   x_ℓ = f_{ℓ-1} ∘ … ∘ f_0 (embed(tokens)),   h = ν ∘ f_{L-1} ∘ … ∘ f_ℓ (x_ℓ)      once, no graph
    spliced    h' = ν ∘ f_{L-1} ∘ … ∘ f_ℓ (x̂),            x̂ = SAE(x_ℓ)                          with a graph
    KL         mean over tokens of KL(softmax(U h + b) ‖ softmax(U h' + b))                       kernels.linear_kl

The prefix is never run twice and no logits are built. Any training loop becomes end-to-end with four lines
(``docs/own_loop.py`` is the runnable version)::

    original = lm.original(tokens, at="blocks.6.hook_resid_pre", downstream=["blocks.8.hook_resid_pre"])
    x_hat = sae(original["blocks.6.hook_resid_pre"])
    spliced = original.splice(x_hat)
    loss = spliced.kl() + spliced.mse("blocks.8.hook_resid_pre") + sparsity

Blocks are the model's own modules, called with the arguments that the model itself would pass (masks, rotary tables): the
embedding part of the model runs with every block replaced by one that writes its arguments down.

The library works on its own tree of modules, which shares the given model's weight storage: nothing is written to the
user's model, no hook is left on it, and its training mode and ``requires_grad`` flags stay as they are.

>>> import torch, transformers
>>> config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50, n_positions=32)
>>> lm = load_lm(transformers.GPT2LMHeadModel(config))
>>> lm
LM(gpt2, 2 layers, d_model 16, d_vocab 50, n_ctx 32, processing transformer_lens)
>>> original = lm.original(torch.randint(50, (4, 8)), at="blocks.1.hook_resid_pre")
>>> x = original["blocks.1.hook_resid_pre"]
>>> float(original.splice(x).kl())
0.0
"""

import copy
import difflib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from e2e_fast import embedded, kernels
from e2e_fast.lm_architectures import ARCHITECTURES, Architecture, Tap

Replacement = Tensor | Callable[[Tensor], Tensor]
"""What a splice puts in an activation's place: a tensor, or a function of the activation that arrives there."""

PROCESSINGS = ("transformer_lens", "none")

ALIASES = {
    "gpt2-small": "gpt2",
    "tiny-stories-1M": "roneneldan/TinyStories-1M",
    "tiny-stories-33M": "roneneldan/TinyStories-33M",
}
"""TransformerLens' short names, for configurations that use them; ``pythia-…`` means ``EleutherAI/pythia-…``."""

_STAGES = ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "mlp.hook_pre", "mlp.hook_post", "hook_mlp_out",
           "hook_resid_post")  # fmt: skip
"""Named points of a block, in the order in which the block computes them."""


def load_lm(
    model: Any,
    processing: str = "transformer_lens",
    device: str | torch.device | None = None,
    *,
    dtype: torch.dtype | None = None,
    tokenizer: Any = None,
) -> "LM":
    """A frozen LM from anything that holds one.

    model: ``embedded``, a Hugging Face name or folder (loaded in float32 unless ``dtype`` says otherwise), a Hugging Face causal LM, a
    TransformerLens ``TransformerBridge`` (3.x, 4.x) or ``HookedTransformer`` (below 4), or an ``LM`` (returned as it is).
    processing: "transformer_lens" gives the activations and logits of TransformerLens' processed models: LayerNorm models
    have the weights that write to the residual stream centred, and models without a logit soft-cap their unembedding
    centred over the vocabulary. "none" leaves the model as it came. ``device=None`` leaves it where it is; ``tokenizer``
    overrides the one found beside the model.

    Raises ValueError for an unknown architecture, processing or kind of object.
    """
    if processing not in PROCESSINGS:
        raise ValueError(f"processing must be one of {PROCESSINGS}, got {processing!r}")
    if isinstance(model, LM):
        if model.processing != processing:
            raise ValueError(f"processing={processing!r} asked of an LM that was loaded with {model.processing!r}")
        return model if device is None else model.to(device)
    source = None
    if isinstance(model, str | os.PathLike):
        source = embedded.path() if str(model) == "embedded" else ALIASES.get(str(model), str(model))
        if source.startswith("pythia-"):
            source = f"EleutherAI/{source}"
        model = _from_pretrained(source, dtype or torch.float32)
    elif dtype is not None:
        raise ValueError(
            f"dtype={dtype} applies to models loaded by name; got a {type(model).__name__}: convert it first"
        )
    lm = LM(model, processing, tokenizer=tokenizer, source=source)
    return lm if device is None else lm.to(device)


class LM:
    """A frozen language model in parts: embedding, blocks, final norm, unembedding. Made by :func:`load_lm`.

    Deliberately no ``nn.Module``: a module that holds an LM does not list the LM's weights among its own.
    """

    def __init__(self, model: Any, processing: str, tokenizer: Any = None, source: str | None = None) -> None:
        front, config, family, weight, bias = _open(model)
        self.processing = processing
        self.config = config
        self._architecture = _architecture(family, config)
        self._parallel = self._architecture.is_parallel(config)
        self._is_hooked = family == "HookedTransformer"
        self._tokenizer = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
        self._source = source or getattr(config, "_name_or_path", None) or None
        self.name: str = self._source or getattr(config, "model_name", None) or family

        blocks, norm = front.get_submodule(self._architecture.blocks), front.get_submodule(self._architecture.norm)
        self.d_vocab, self.d_model = (int(n) for n in weight.shape)
        self.n_ctx: int = _first_of(config, "max_position_embeddings", "n_ctx")
        softcap = _first_of(config, "final_logit_softcapping", "output_logits_soft_cap", default=None)
        softcap = float(softcap) if softcap is not None and softcap > 0 else None
        if processing == "transformer_lens":
            if _has_layer_norm(norm, config):
                _centre_writers(front, blocks, self._architecture)
            if softcap is None:
                weight, bias = _centred(weight, 0), None if bias is None else _centred(bias, 0)
        self.unembed = Unembedding(weight, bias, softcap)

        # The front keeps the embedding and everything the model computes before its blocks; blocks only take notes there.
        self._notes = _Notes()
        self._parts = nn.ModuleDict({"blocks": blocks, "norm": norm, "unembed": self.unembed})
        front.set_submodule(
            self._architecture.blocks, nn.ModuleList([_NoteTaker(self._notes, block) for block in blocks])
        )
        front.set_submodule(self._architecture.norm, nn.Identity())
        self._parts["front"] = front
        self._parts.eval()
        self._blocks: list[nn.Module] = list(blocks)
        self.n_layers = len(self._blocks)
        self._order = _positions(self.n_layers, self._parallel)
        self._widths = self._probe()

    # ------------------------------------------------------------------------------------------------ what it is

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
        """The floating type of the activations."""
        return self.unembed.weight.dtype

    def to(self, device: str | torch.device) -> "LM":
        """Moves this LM (never the model that it was made from) and returns it."""
        self._parts.to(device)
        return self

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer that lies beside the model, loaded on first use; None where there is none."""
        if self._tokenizer is None and self._source is not None:
            self._tokenizer = _load_tokenizer(self._source)
            self._source = None
        return self._tokenizer

    def positions(self) -> list[str]:
        """Every position that can be read and spliced, in the order of the network."""
        return list(self._order)

    def width(self, position: str) -> int:
        """Number of channels at a position: d_model, or d_mlp at ``mlp.hook_pre`` and ``mlp.hook_post``."""
        return self._widths[self.check_position(position).partition(".")[2].partition(".")[2]]

    def check_position(self, position: str) -> str:
        """The position itself; raises ValueError, with near names, where the model lacks it."""
        if position in self._order:
            return position
        near = difflib.get_close_matches(str(position), self._order, n=3)
        hint = f"; near: {', '.join(near)}" if near else f"; there are {', '.join(self._order[:3])}, …"
        if "hook_resid_mid" in str(position) and self._parallel:
            hint += " (attention and MLP are parallel in this model, so there is no hook_resid_mid)"
        raise ValueError(f"position {position!r} is not one of {self.name}'s ({self.n_layers} layers){hint}")

    def check_tokens(self, tokens: Tensor) -> None:
        """Raises ValueError unless tokens is [B, T] of integers in [0, d_vocab), T ≤ n_ctx. Waits for a CUDA tensor."""
        self._check_shape(tokens)
        if tokens.numel() == 0:
            return
        low, high = (int(v) for v in tokens.aminmax())
        if low < 0 or high >= self.d_vocab:
            raise ValueError(
                f"tokens must lie in [0, {self.d_vocab}) (the vocabulary of {self.name}), got {low}…{high}"
            )

    def _check_shape(self, tokens: Tensor) -> None:
        if not isinstance(tokens, Tensor) or tokens.ndim != 2:
            came = list(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
            raise ValueError(f"tokens must be a tensor of shape [batch, sequence], got {came}")
        if tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"tokens must be int64 or int32, got {tokens.dtype}")
        if tokens.shape[1] > self.n_ctx:
            raise ValueError(f"tokens must be at most n_ctx = {self.n_ctx} long, got sequences of {tokens.shape[1]}")

    # ------------------------------------------------------------------------------------------------ the two passes

    @torch.no_grad()
    def original(
        self,
        tokens: Tensor,
        at: str | Iterable[str] = (),
        downstream: Iterable[str] = (),
        suffix: bool = True,
    ) -> "Original":
        """The unchanged model on tokens [B, T], once and without a graph.

        at: position or positions that a splice will replace; downstream: positions to compare. Both can be read from the
        result. ``suffix=False`` stops after the last of them, for training that needs no output of the model.

        Token ids are checked on the CPU only (a CUDA tensor would have to be waited for: :meth:`check_tokens`).
        Raises ValueError for unknown positions and for tokens of wrong shape, type, length or range.
        """
        at = [at] if isinstance(at, str) else list(at)
        downstream = [downstream] if isinstance(downstream, str) else list(downstream)
        named = sorted({self.check_position(p) for p in (*at, *downstream)}, key=self._order.__getitem__)
        self._check_shape(tokens)
        if tokens.device.type == "cpu":
            self.check_tokens(tokens)

        wanted = set(named)
        for layer, stage in map(_parse, at):  # what a splice inside a block starts from
            if stage not in ("hook_resid_pre", "hook_resid_post"):
                wanted |= {f"blocks.{layer}.hook_resid_pre", f"blocks.{layer}.hook_attn_out"}
        stop = self.n_layers if suffix else max(map(_blocks_needed, wanted), default=0)

        x, calls = self._embed(tokens.to(self.device, non_blocking=True))
        visit = _Visit(wanted)
        x = self._advance(visit("blocks.0.hook_resid_pre", x), calls, 0, stop, visit)
        return Original(self, tokens, at, named, visit.seen, calls, self._parts["norm"](x) if suffix else None)

    def _embed(self, tokens: Tensor) -> tuple[Tensor, list["_Call"]]:
        """The stream before block 0, [B, T, D], and the arguments that each block is called with."""
        self._notes.calls = []
        front = self._parts["front"]
        if self._is_hooked:
            x = front(tokens, return_type=None, stop_at_layer=self.n_layers)
        else:
            x = front(tokens, use_cache=False, output_attentions=False, output_hidden_states=False, return_dict=True)
            x = x.last_hidden_state
        return x, self._notes.calls

    def _advance(self, x: Tensor, calls: list["_Call"], start: int, stop: int, visit: "_Visit") -> Tensor:
        """From the stream before block ``start`` to the stream before block ``stop``."""
        for layer in range(start, stop):
            if layer in visit.inside:
                attn_out = visit(f"blocks.{layer}.hook_attn_out", self._attention(layer, x, calls[layer]))
                x = self._after_attention(layer, x, attn_out, visit)
            else:
                x = _tensor(self._blocks[layer](x, *calls[layer].args, **calls[layer].kwargs))
            x = self._between(layer, x, visit)
        return x

    def _between(self, layer: int, x: Tensor, visit: "_Visit") -> Tensor:
        x = visit(f"blocks.{layer}.hook_resid_post", x)
        return visit(f"blocks.{layer + 1}.hook_resid_pre", x) if layer + 1 < self.n_layers else x

    def _attention(self, layer: int, x: Tensor, call: "_Call") -> Tensor:
        """The attention branch: the block's own forward, left at the module that yields attn_out."""
        block = self._blocks[layer]
        handle = block.get_submodule(self._architecture.attn_out).register_forward_hook(_leave)
        try:
            block(x, *call.args, **call.kwargs)
        except _Left as left:
            return left.output
        finally:
            handle.remove()
        raise RuntimeError(f"block {layer} of {self.name} never called its {self._architecture.attn_out}")

    def _after_attention(
        self, layer: int, x: Tensor, attn_out: Tensor, visit: "_Visit", mlp_out: Tensor | None = None
    ) -> Tensor:
        """The rest of a block, from attn_out (and mlp_out, where it is known already) to the block's output."""
        mid = x + attn_out
        if not self._parallel:
            mid = x = visit(f"blocks.{layer}.hook_resid_mid", mid)
        if mlp_out is None:
            mlp_out = self._mlp(layer, x, visit)
        return mid + visit(f"blocks.{layer}.hook_mlp_out", mlp_out)

    def _mlp(self, layer: int, x: Tensor, visit: "_Visit") -> Tensor:
        block = self._blocks[layer]
        taps = {"mlp.hook_pre": self._architecture.mlp_pre, "mlp.hook_post": self._architecture.mlp_post}
        handles = [
            _tap(block, tap, visit, name)
            for stage, tap in taps.items()
            if (name := f"blocks.{layer}.{stage}") in visit.names
        ]
        try:
            for path in self._architecture.mlp:
                x = _tensor(block.get_submodule(path)(x))
        finally:
            for handle in handles:
                handle.remove()
        return x

    @torch.no_grad()
    def _probe(self) -> dict[str, int]:
        """Runs one token: learns what block 0 returns and the width of each stage, and checks the table against it."""
        tokens = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        x, calls = self._embed(tokens)
        if len(calls) != self.n_layers or x.shape != (1, 1, self.d_model):
            raise ValueError(
                f"{self.name} does not run its blocks one after the other: its architecture is not supported"
            )
        whole = _tensor(self._blocks[0](x, *calls[0].args, **calls[0].kwargs))
        visit = _Visit(p for p in self._order if p.startswith("blocks.0."))
        parts = self._advance(visit("blocks.0.hook_resid_pre", x), calls, 0, 1, visit)
        if not torch.allclose(whole, parts, rtol=1e-2, atol=1e-2 * float(whole.abs().amax())):
            raise ValueError(
                f"{self.name}'s blocks are not what the table of architectures says of {type(self._blocks[0])}"
            )
        return {name.removeprefix("blocks.0."): value.shape[-1] for name, value in visit.seen.items()}


class Unembedding(nn.Module):
    """From the hidden state after the final norm to logits: ``h @ weight.T + bias``, soft-capped."""

    weight: Tensor
    """(V, D)."""
    bias: Tensor | None
    """(V,) or None."""
    softcap: float | None
    """c in ``c · tanh(logits / c)`` (Gemma 2), or None."""

    def __init__(self, weight: Tensor, bias: Tensor | None, softcap: float | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach())
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.softcap = softcap

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] → logits [..., V]."""
        logits = nnf.linear(hidden, self.weight, self.bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class Original(Mapping[str, Tensor]):
    """What the unchanged model did on a batch: a mapping from the named positions to activations [B, T, width]."""

    def __init__(
        self,
        lm: LM,
        tokens: Tensor,
        at: list[str],
        named: list[str],
        seen: dict[str, Tensor],
        calls: list["_Call"],
        final: Tensor | None,
    ) -> None:
        self.lm = lm
        self.tokens = tokens
        self.at = at
        self._named = named
        self._seen = seen
        self._calls = calls
        self._final = final

    def __getitem__(self, position: str) -> Tensor:
        if position not in self._named:
            raise KeyError(f"{position!r} was not asked for: name it in at= or downstream= (there are {self._named})")
        return self._seen[position]

    def __iter__(self) -> Iterator[str]:
        return iter(self._named)

    def __len__(self) -> int:
        return len(self._named)

    @property
    def final(self) -> Tensor:
        """[B, T, D]: the hidden state after the final norm, which the unembedding reads. Not there with suffix=False."""
        if self._final is None:
            raise RuntimeError("the original pass stopped early (suffix=False): there is no final state, logits or KL")
        return self._final

    @torch.no_grad()
    def logits(self) -> Tensor:
        """[B, T, V]."""
        return self.lm.unembed(self.final)

    def splice(self, x_hat: Replacement | Mapping[str, Replacement]) -> "Spliced":
        """The model from the first spliced position on, with a graph.

        x_hat: a tensor [B, T, width] or a function of the activation when ``at`` names one position; else
        ``{position: tensor or function}``. Functions are called in the order of the network, with the activation that
        arrives at their position: a later one sees what the earlier ones did. Positions of ``at`` that are left out stay
        as they are.

        Raises ValueError for positions outside ``at`` and for an x_hat of another shape, dtype or device.
        """
        if not isinstance(x_hat, Mapping):
            if len(self.at) != 1:
                raise ValueError(f"x_hat must be a mapping from position to replacement: at= names {self.at}")
            x_hat = {self.at[0]: x_hat}
        for position in x_hat:
            if position not in self.at:
                raise ValueError(f"x_hat names {position!r}, which is not in at= ({self.at})")
        if not x_hat:
            raise ValueError("x_hat replaces nothing: it is an empty mapping")
        return Spliced(self, dict(x_hat))


class Spliced:
    """The model's run with replaced activations. Blocks after the last captured position wait until they are needed."""

    def __init__(self, original: Original, replace: dict[str, Replacement]) -> None:
        lm = self._lm = original.lm
        self._original = original
        first = min(replace, key=lm._order.__getitem__)
        after = {p for p in original if lm._order[p] >= lm._order[first]}
        self._visit = _Visit(after, replace)
        stop = max(map(_blocks_needed, after))
        x, start = self._enter(first)
        self._next = max(start, stop)
        self._stream = lm._advance(x, original._calls, start, self._next, self._visit)
        self._final: Tensor | None = None

    def _enter(self, first: str) -> tuple[Tensor, int]:
        """Runs to the end of the block that holds the first replacement: the stream and the index of the next block."""
        lm, seen, visit = self._lm, self._original._seen, self._visit
        layer, stage = _parse(first)
        if stage == "hook_resid_pre":
            return visit(first, seen[first]), layer
        if stage == "hook_resid_post":
            return lm._between(layer, seen[first], visit), layer + 1
        x, attn_out = seen[f"blocks.{layer}.hook_resid_pre"], seen[f"blocks.{layer}.hook_attn_out"]
        attn_out = visit(f"blocks.{layer}.hook_attn_out", attn_out)
        x = lm._after_attention(layer, x, attn_out, visit, seen[first] if stage == "hook_mlp_out" else None)
        return lm._between(layer, x, visit), layer + 1

    def __getitem__(self, position: str) -> Tensor:
        """The activation that arrives at a named position (before its own replacement), with a graph."""
        seen = self._visit.seen
        return seen[position] if position in seen else self._original[position]

    @property
    def final(self) -> Tensor:
        """[B, T, D]: the hidden state after the final norm."""
        if self._final is None:
            lm = self._lm
            self._stream = lm._advance(self._stream, self._original._calls, self._next, lm.n_layers, self._visit)
            self._next = lm.n_layers
            self._final = lm._parts["norm"](self._stream)
        return self._final

    def logits(self) -> Tensor:
        """[B, T, V]."""
        return self._lm.unembed(self.final)

    def kl(self) -> Tensor:
        """KL(original ‖ spliced) over the vocabulary, nats, mean over all B·T tokens; never builds the logits."""
        unembed, teacher = self._lm.unembed, self._original.final
        student = self.final.flatten(0, 1)
        return kernels.linear_kl(student, teacher.flatten(0, 1), unembed.weight, unembed.bias, softcap=unembed.softcap)

    def mse(self, position: str) -> Tensor:
        """Mean squared difference between what arrives at a position and the original, over tokens and channels."""
        return nnf.mse_loss(self[position], self._original[position])


# ---------------------------------------------------------------------------------------------------- running blocks


class _Call:
    """The arguments that a block is called with, next to the stream."""

    __slots__ = ("args", "kwargs")

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args = args
        self.kwargs = kwargs


class _Notes:
    """The calls of one pass, and whether the model's blocks answer with a bare tensor or a tuple that starts with it."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []
        self.answers_tuple: bool | None = None


class _NoteTaker(nn.Module):
    """Stands where a block stood: writes the call down and passes the stream on."""

    def __init__(self, notes: _Notes, block: nn.Module) -> None:
        super().__init__()
        self._notes = notes
        self._block = [block]  # in a list: it is not a part of this module
        # Some models of transformers below 4.57 choose the mask by an attribute of the block.
        if hasattr(block, "attention_type"):
            self.attention_type = block.attention_type

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        self._notes.calls.append(_Call(args, kwargs))
        if self._notes.answers_tuple is None:
            self._notes.answers_tuple = not isinstance(self._block[0](x, *args, **kwargs), Tensor)
        return (x,) if self._notes.answers_tuple else x


class _Visit:
    """Sees the activations at some positions and replaces those it has a replacement for."""

    def __init__(self, wanted: Iterable[str], replace: Mapping[str, Replacement] | None = None) -> None:
        self.replace = replace or {}
        self.names = {*wanted, *self.replace}
        self.inside = {layer for layer, stage in map(_parse, self.names) if stage in _STAGES[1:-1]}
        self.seen: dict[str, Tensor] = {}

    def __call__(self, name: str, x: Tensor) -> Tensor:
        if name not in self.names:
            return x
        self.seen[name] = x
        if name not in self.replace:
            return x
        x_hat = self.replace[name]
        if not isinstance(x_hat, Tensor):
            x_hat = x_hat(x)
        if not isinstance(x_hat, Tensor) or (x_hat.shape, x_hat.dtype, x_hat.device) != (x.shape, x.dtype, x.device):
            came = _describe(x_hat) if isinstance(x_hat, Tensor) else f"a {type(x_hat).__name__}"
            raise ValueError(f"x_hat at {name} must be like the activation, {_describe(x)}, got {came}")
        return x_hat


class _Left(Exception):
    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    raise _Left(_tensor(output))


def _tap(block: nn.Module, tap: Tap, visit: _Visit, name: str) -> Any:
    module = block.get_submodule(tap.module)
    if tap.side == "input":
        return module.register_forward_pre_hook(lambda _, args: (visit(name, args[0]), *args[1:]))
    return module.register_forward_hook(lambda _, args, output: visit(name, output))


def _tensor(output: Any) -> Tensor:
    """A module's main output: some return (tensor, attention weights, …)."""
    return output if isinstance(output, Tensor) else output[0]


def _describe(x: Tensor) -> str:
    return f"{list(x.shape)} {x.dtype} on {x.device}"


# ---------------------------------------------------------------------------------------------------- positions


def _positions(n_layers: int, parallel: bool) -> dict[str, int]:
    """Position → its place in the order of the network."""
    stages = [stage for stage in _STAGES if not (parallel and stage == "hook_resid_mid")]
    return {
        name: i for i, name in enumerate(f"blocks.{layer}.{stage}" for layer in range(n_layers) for stage in stages)
    }


def _parse(position: str) -> tuple[int, str]:
    _, layer, stage = position.split(".", 2)
    return int(layer), stage


def _blocks_needed(position: str) -> int:
    layer, stage = _parse(position)
    return layer if stage == "hook_resid_pre" else layer + 1


# ---------------------------------------------------------------------------------------------------- taking a model apart


def _from_pretrained(source: str, dtype: torch.dtype) -> Any:
    import transformers

    name = "dtype" if _version(transformers.__version__) >= (4, 56) else "torch_dtype"
    return transformers.AutoModelForCausalLM.from_pretrained(source, **{name: dtype})


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def _load_tokenizer(source: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError):  # the documented outcome of a model without tokenizer files
        return None


class _Opened(NamedTuple):
    """A model taken apart: all modules belong to our own tree."""

    base: Any
    """Embeds tokens, runs the blocks, applies the final norm."""
    config: Any
    family: str
    """Key in the table of architectures."""
    weight: Tensor
    """(V, D), the unembedding."""
    bias: Tensor | None
    """(V,)."""


def _open(model: Any) -> _Opened:
    names = {c.__name__ for c in type(model).__mro__}
    if "HookedTransformer" in names:
        twin = _twin(model, {})
        twin.cfg = copy.copy(model.cfg)  # it names the device, which is ours to change
        return _Opened(twin, twin.cfg, "HookedTransformer", twin.unembed.W_U.T.contiguous(), twin.unembed.b_U)
    bridge = model if "TransformerBridge" in names else None
    if bridge is not None:
        model = bridge.original_model
    elif not ("PreTrainedModel" in names and hasattr(model, "get_output_embeddings")):
        raise ValueError(
            "model must be a name, a folder, a Hugging Face causal LM, a TransformerBridge or a HookedTransformer, "
            f"got {type(model).__name__}"
        )
    twin = _twin(model, {})
    if bridge is not None:
        _undo_bridge(bridge, twin)
    head = twin.get_output_embeddings()
    if head is None:
        raise ValueError(f"model must be a causal LM (with an unembedding), got {type(model).__name__}")
    return _Opened(twin.base_model, twin.config, twin.config.model_type, head.weight, getattr(head, "bias", None))


def _undo_bridge(bridge: Any, twin: Any) -> None:
    """What the bridge changed besides wrapping modules: attention made eager, and joint QKV matrices split."""
    if twin.config._attn_implementation == "eager" and getattr(twin, "_supports_sdpa", False):
        config = copy.copy(twin.config)
        config._attn_implementation = "sdpa"
        for module in twin.modules():
            if vars(module).get("config") is twin.config:
                module.config = config
        twin.config = config
    joint = _architecture(twin.config.model_type, twin.config).joint_qkv
    if joint is None or not getattr(bridge, "_weights_processed", False):
        return
    # Weight processing writes to the split matrices and leaves the joint one as it was.
    blocks = twin.base_model.get_submodule(ARCHITECTURES[twin.config.model_type].blocks)
    heads = twin.config.num_attention_heads if joint.by_head else 1
    for block, bridged in zip(blocks, bridge.blocks, strict=True):
        module = block.get_submodule(joint.module)
        for name in ("weight", "bias"):
            split = [getattr(getattr(bridged.attn, letter).original_component, name).detach() for letter in "qkv"]
            rows = torch.stack([part.unflatten(0, (heads, -1)) for part in split], dim=1).flatten(0, 2)
            is_linear = isinstance(module, nn.Linear) or name == "bias"
            module._parameters[name] = nn.Parameter(rows if is_linear else rows.T, requires_grad=False)


def _architecture(family: str, config: Any) -> Architecture:
    if family not in ARCHITECTURES:
        raise ValueError(f"model of type {family!r} is not supported; supported: {', '.join(sorted(ARCHITECTURES))}")
    row = ARCHITECTURES[family]
    if getattr(config, "use_normalization_before_and_after", False):  # HookedTransformer of Gemma 2 and 3
        row = row._replace(mlp=(*row.mlp, "ln2_post"))
    return row


def _twin(module: Any, weights: dict[int, nn.Parameter]) -> Any:
    """A tree of the same modules without hooks, its parameters frozen and sharing storage with the original's."""
    if hasattr(module, "_hf_hook"):
        raise ValueError("model is spread over devices by accelerate (device_map): load it on one device")
    while "_original_component" in module._modules:  # TransformerBridge wraps modules in place
        module = module._modules["_original_component"]
    if "forward" in vars(module):
        raise ValueError(f"model has a patched forward method in {type(module).__name__}: load a fresh copy of it")
    twin = copy.copy(module)
    for name, value in vars(module).items():
        if "_hooks" in name and isinstance(value, dict):
            vars(twin)[name] = type(value)()
    twin._parameters = {name: _frozen(p, weights) for name, p in module._parameters.items()}
    twin._buffers = dict(module._buffers)
    twin._modules = {name: None if m is None else _twin(m, weights) for name, m in module._modules.items()}
    return twin


def _frozen(parameter: nn.Parameter | None, weights: dict[int, nn.Parameter]) -> nn.Parameter | None:
    if parameter is None:
        return None
    return weights.setdefault(id(parameter), nn.Parameter(parameter.detach(), requires_grad=False))


def _has_layer_norm(norm: nn.Module, config: Any) -> bool:
    return isinstance(norm, nn.LayerNorm) or getattr(config, "normalization_type", None) in ("LN", "LNPre")


def _centre_writers(front: nn.Module, blocks: Iterable[nn.Module], architecture: Architecture) -> None:
    """Takes from every vector that is added to the residual stream its mean over d_model."""
    trees = [(front, architecture.embeddings), *((block, architecture.writers) for block in blocks)]
    for tree, paths in trees:
        for path in paths:
            owner, _, name = path.rpartition(".")
            module = dict(tree.named_modules()).get(owner)
            parameter = getattr(module, name, None)
            if module is not None and parameter is not None:
                axis = 0 if isinstance(module, nn.Linear) else -1
                module._parameters[name] = nn.Parameter(_centred(parameter, axis), requires_grad=False)


def _centred(weight: Tensor, axis: int) -> Tensor:
    exact = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    return (exact - exact.mean(axis, keepdim=True)).to(weight.dtype)


def _first_of(config: Any, *names: str, default: Any = ...) -> Any:
    for name in names:
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    if default is ...:
        raise ValueError(f"the model's configuration has none of {names}")
    return default
