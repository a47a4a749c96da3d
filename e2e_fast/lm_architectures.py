"""Where each architecture keeps its parts: one row per model family, read by :mod:`e2e_fast.lm`.

Every supported block adds an attention branch and an MLP branch to the residual stream:

    sequential   mid = x + attn_out;  out = mid + mlp_out,  mlp_out a function of mid
    parallel     out = x + attn_out + mlp_out,              mlp_out a function of x  (GPT-NeoX)

so a row names the module that yields attn_out, the chain of modules from the stream to mlp_out, the modules at which the
hidden layer of the MLP is seen, and the parameters that write to the stream. To support another family add a row; loading a
model checks it against the model's own first block.

>>> sorted(ARCHITECTURES)[:3]
['HookedTransformer', 'gemma', 'gemma2']
"""

from typing import Any, NamedTuple


class Tap(NamedTuple):
    """A tensor inside the block: the input or the output of one module."""

    module: str
    """Path of the module inside the block."""
    side: str
    """"input" or "output"."""


class JointQKV(NamedTuple):
    """One matrix for queries, keys and values."""

    module: str
    """Path of the module inside the block."""
    by_head: bool
    """Whether its rows go head by head (q, k, v of head 0, …) or all queries first."""


class Architecture(NamedTuple):
    """Paths of one model family; paths of blocks, norm and embeddings start at the base model, the others at a block."""

    blocks: str
    """The list of blocks."""
    norm: str
    """The final norm."""
    embeddings: tuple[str, ...]
    """Parameters whose rows start the residual stream."""
    attn_out: str
    """Module whose output is added to the stream as the attention's contribution (after a post-norm, where there is one)."""
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

    def is_parallel(self, config: Any) -> bool:
        """Whether both branches read the block's input."""
        return self.parallel is not None and bool(getattr(config, self.parallel))


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
