"""Where each architecture keeps its parts, and how a user's model is taken apart without touching it.

Every supported block adds an attention branch and an MLP branch to the residual stream:

    sequential   mid = x + attn_out;  out = mid + mlp_out,  mlp_out a function of mid
    parallel     out = x + attn_out + mlp_out,              mlp_out a function of x  (GPT-NeoX)

so a row names the module that yields attn_out, the chain of modules from the stream to mlp_out, the modules at which
the hidden layer of the MLP is seen, and the parameters that write to the stream. To support another family add a row;
loading a model checks it against the model's own first block.

>>> ARCHITECTURES["gpt2"].mlp
('ln_2', 'mlp')
"""

import copy
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Tap(NamedTuple):
    """A tensor inside the block: the input or the output of one module."""

    module: str
    """Path of the module inside the block."""
    side: str
    """Which side of it: "input" or "output"."""


class JointQKV(NamedTuple):
    """One matrix for queries, keys and values."""

    module: str
    """Path of the module inside the block."""
    by_head: bool
    """Whether its rows go head by head (q, k, v of head 0, …) or all queries first."""


class Architecture(NamedTuple):
    """Paths of one family: those of blocks, norm and embeddings start at the base model, the others at a block."""

    blocks: str
    """The list of blocks."""
    norm: str
    """The final norm."""
    embeddings: tuple[str, ...]
    """Parameters whose rows start the residual stream."""
    attn_out: str
    """Module whose output the attention adds to the stream (its post-norm, where there is one)."""
    mlp: tuple[str, ...]
    """Modules applied in turn from the stream to the MLP's contribution."""
    mlp_pre: Tap
    """TransformerLens' ``mlp.hook_pre``: before the activation function (of the gate, in gated MLPs)."""
    mlp_post: Tap
    """TransformerLens' ``mlp.hook_post``: what the last matrix of the MLP reads."""
    writers: tuple[str, ...]
    """Parameters of a block that write to the stream; absent ones (biases) are skipped."""
    joint_qkv: JointQKV | None = None
    """Where queries, keys and values share a matrix."""
    parallel: str | None = None
    """Attribute of the configuration that says whether attention and MLP both read the block's input."""


def _linear(*paths: str) -> tuple[str, ...]:
    return tuple(f"{path}.{name}" for path in paths for name in ("weight", "bias"))


GPT2 = Architecture(
    blocks="h",
    norm="ln_f",
    embeddings=("wte.weight", "wpe.weight"),
    attn_out="attn",
    mlp=("ln_2", "mlp"),
    mlp_pre=Tap("mlp.c_fc", "output"),
    mlp_post=Tap("mlp.c_proj", "input"),
    writers=_linear("attn.c_proj", "mlp.c_proj"),
    joint_qkv=JointQKV("attn.c_attn", by_head=False),
)

LLAMA = Architecture(
    blocks="layers",
    norm="norm",
    embeddings=("embed_tokens.weight",),
    attn_out="self_attn",
    mlp=("post_attention_layernorm", "mlp"),
    mlp_pre=Tap("mlp.gate_proj", "output"),
    mlp_post=Tap("mlp.down_proj", "input"),
    writers=_linear("self_attn.o_proj", "mlp.down_proj"),
)

GEMMA2 = LLAMA._replace(
    attn_out="post_attention_layernorm",
    mlp=("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"),
)

GPT_NEOX = Architecture(
    blocks="layers",
    norm="final_layer_norm",
    embeddings=("embed_in.weight",),
    attn_out="attention",
    mlp=("post_attention_layernorm", "mlp"),
    mlp_pre=Tap("mlp.dense_h_to_4h", "output"),
    mlp_post=Tap("mlp.dense_4h_to_h", "input"),
    writers=_linear("attention.dense", "mlp.dense_4h_to_h"),
    joint_qkv=JointQKV("attention.query_key_value", by_head=True),
    parallel="use_parallel_residual",
)

ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": GPT2,
    "gpt_neo": GPT2._replace(writers=_linear("attn.attention.out_proj", "mlp.c_proj"), joint_qkv=None),
    "gpt_neox": GPT_NEOX,
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma": LLAMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA2,
    # TransformerLens' own module tree (TransformerLens 2 and 3).
    "HookedTransformer": Architecture(
        blocks="blocks",
        norm="ln_final",
        embeddings=("embed.W_E", "pos_embed.W_pos"),
        attn_out="hook_attn_out",
        mlp=("ln2", "mlp"),
        mlp_pre=Tap("mlp.hook_pre", "output"),
        mlp_post=Tap("mlp.hook_post", "output"),
        writers=("attn.W_O", "attn.b_O", "mlp.W_out", "mlp.b_out"),
        parallel="parallel_attn_mlp",
    ),
}
"""Family → its row. Keys are Hugging Face's ``config.model_type``."""


class Parts(NamedTuple):
    """A model taken apart. The modules are a tree of our own, whose weights are the model's."""

    base: Any
    """Embeds tokens, runs the blocks, applies the final norm."""
    norm: nn.Module
    """The final norm."""
    config: Any
    family: str
    """Key in the table."""
    architecture: Architecture
    parallel: bool
    """Whether attention and MLP both read the block's input."""
    has_layer_norm: bool
    """Whether every reader of the stream subtracts its mean first, so that writers may be centred."""
    weight: Tensor
    """(V, D): the unembedding."""
    bias: Tensor | None
    """(V,)."""
    softcap: float | None
    """Bound of the logits."""


def take_apart(model: Any) -> Parts:
    """The parts of a Hugging Face causal LM, a TransformerBridge or a HookedTransformer.

    Raises ValueError for anything else, for families outside the table, and for models whose weights or modules cannot
    be shared: quantised, spread over devices by accelerate, or with patched forward methods.
    """
    names = {c.__name__ for c in type(model).__mro__}
    if "HookedTransformer" in names:
        return _take_apart_hooked(model)
    if "TransformerBridge" in names:
        twin = _twin(model.original_model, {})
        _use_sdpa(twin)
        if getattr(model, "_weights_processed", False):
            _rejoin_qkv(model, twin)
    elif "PreTrainedModel" in names and hasattr(model, "get_output_embeddings"):
        twin = _twin(model, {})
    else:
        raise ValueError(
            "model must be a name, a folder, a Hugging Face causal LM, a TransformerBridge or a HookedTransformer, "
            f"got a {type(model).__name__}"
        )
    head, config = twin.get_output_embeddings(), twin.config.get_text_config()
    if head is None:
        raise ValueError(f"model must be a causal LM (with an unembedding), got a {type(model).__name__}")
    family = config.model_type
    architecture = _row(family)
    base = _decoder(twin)
    norm = base.get_submodule(architecture.norm)
    return Parts(
        base=base,
        norm=norm,
        config=config,
        family=family,
        architecture=architecture,
        parallel=architecture.parallel is not None and getattr(config, architecture.parallel),
        has_layer_norm=isinstance(norm, nn.LayerNorm),
        weight=head.weight,
        bias=getattr(head, "bias", None),
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def _take_apart_hooked(model: Any) -> Parts:
    config = copy.copy(model.cfg)  # it names the device, which is ours to change
    if config.attn_only or config.positional_embedding_type == "shortformer" or config.normalization_type is None:
        raise ValueError(f"model must have MLPs, norms and no shortformer embedding, got {config.model_name}")
    twin = _twin(model, {})
    twin.cfg = config
    architecture = _row("HookedTransformer")
    if config.use_normalization_before_and_after:
        architecture = architecture._replace(mlp=(*architecture.mlp, "ln2_post"))
    return Parts(
        base=twin,
        norm=twin.ln_final,
        config=config,
        family="HookedTransformer",
        architecture=architecture,
        parallel=config.parallel_attn_mlp,
        has_layer_norm=config.normalization_type in ("LN", "LNPre") and not config.final_rms,
        weight=nn.Parameter(twin.unembed.W_U.T.contiguous(), requires_grad=False),
        bias=twin.unembed.b_U,
        softcap=config.output_logits_soft_cap if config.output_logits_soft_cap > 0 else None,
    )


def centre_writers(base: nn.Module, blocks: Iterable[nn.Module], architecture: Architecture) -> None:
    """Takes from every vector that is added to the residual stream its mean over d_model."""
    for tree, paths in [(base, architecture.embeddings), *((block, architecture.writers) for block in blocks)]:
        modules = dict(tree.named_modules())
        for path in paths:
            owner, _, name = path.rpartition(".")
            module = modules.get(owner)
            parameter = getattr(module, name, None)
            if module is not None and parameter is not None:
                # Linear stores [out, in]; embeddings, GPT-2's Conv1D and TransformerLens have d_model last.
                axis = 0 if isinstance(module, nn.Linear) else -1
                module._parameters[name] = _centred(parameter, axis)


def centre_unembedding(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """weight (V, D) and bias (V,) minus their means over the vocabulary: logits that sum to zero, the same softmax."""
    return _centred(weight, 0), None if bias is None else _centred(bias, 0)


def _centred(weight: Tensor, axis: int) -> nn.Parameter:
    exact = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    return nn.Parameter((exact - exact.mean(axis, keepdim=True)).to(weight.dtype), requires_grad=False)


def _row(family: str) -> Architecture:
    if family not in ARCHITECTURES:
        raise ValueError(f"model of type {family!r} is not supported; supported: {', '.join(sorted(ARCHITECTURES))}")
    return ARCHITECTURES[family]


def _decoder(model: Any) -> Any:
    """The module with the embedding, the blocks and the final norm: in multimodal models, a part of the base model."""
    blocks, base = _row(model.config.get_text_config().model_type).blocks, model.base_model
    while not hasattr(base, blocks):
        inner = [getattr(base, name) for name in ("language_model", "model") if hasattr(base, name)]
        if not inner:
            raise ValueError(f"model has no {blocks!r} in its {type(base).__name__}")
        base = inner[0]
    return base


def _twin(module: Any, weights: dict[int, nn.Parameter]) -> Any:
    """The same tree of modules, without hooks; its parameters are frozen and share storage with the original's."""
    while "_original_component" in module._modules:  # TransformerBridge wraps modules in place
        module = module._modules["_original_component"]
    if hasattr(module, "_hf_hook"):
        raise ValueError("model is spread over devices by accelerate (device_map): load it on one device")
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
    if type(parameter) is not nn.Parameter:
        raise ValueError(f"model must have plain weights, got {type(parameter).__name__}: load it without quantisation")
    if id(parameter) not in weights:  # tied weights stay tied
        weights[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    return weights[id(parameter)]


def _use_sdpa(twin: Any) -> None:
    """Undoes the eager attention that TransformerBridge asks for, where the model has SDPA."""
    if twin.config._attn_implementation == "eager" and getattr(twin, "_supports_sdpa", False):
        eager, sdpa = twin.config, copy.copy(twin.config)
        sdpa._attn_implementation = "sdpa"
        for module in twin.modules():
            if vars(module).get("config") is eager:
                module.config = sdpa


def _rejoin_qkv(bridge: Any, twin: Any) -> None:
    """TransformerBridge splits joint QKV matrices and processes the split ones: writes them back into the joint one."""
    architecture = _row(twin.config.get_text_config().model_type)
    joint = architecture.joint_qkv
    if joint is None:
        return
    heads = twin.config.num_attention_heads if joint.by_head else 1
    for block, bridged in zip(_decoder(twin).get_submodule(architecture.blocks), bridge.blocks, strict=True):
        module = block.get_submodule(joint.module)
        for name in ("weight", "bias"):
            split = [getattr(getattr(bridged.attn, letter).original_component, name).detach() for letter in "qkv"]
            rows = torch.stack([part.unflatten(0, (heads, -1)) for part in split], dim=1).flatten(0, 2)
            stored = rows if name == "bias" or isinstance(module, nn.Linear) else rows.T
            module._parameters[name] = nn.Parameter(stored, requires_grad=False)
