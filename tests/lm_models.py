"""Tiny random models of every supported family, and TransformerLens' own version of them."""

from collections.abc import Callable
from typing import Any

import torch

LAYERS, WIDTH, VOCAB, CONTEXT = 3, 32, 50, 24

_LLAMA = {
    "num_hidden_layers": LAYERS, "hidden_size": WIDTH, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "vocab_size": VOCAB, "max_position_embeddings": CONTEXT, "bos_token_id": 0,
    "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
_WINDOW = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8,
           "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}  # fmt: skip
_NEO = {
    "hidden_size": WIDTH, "vocab_size": VOCAB, "max_position_embeddings": CONTEXT, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip

# Family → class name without suffix, configuration.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {
        "n_layer": LAYERS, "n_embd": WIDTH, "n_head": 4, "vocab_size": VOCAB, "n_positions": CONTEXT, "bos_token_id": 0,
        "eos_token_id": 0}),
    "gpt_neo": ("GPTNeoForCausalLM", "GPTNeoConfig", _NEO | {
        "num_layers": LAYERS, "num_heads": 4, "window_size": 5,
        "attention_types": [[["global", "local", "global"], 1]]}),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _NEO | {
        "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 48}),
    "gpt_neox_sequential": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _NEO | {
        "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 48,
        "use_parallel_residual": False}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _LLAMA),
    "llama_biased": ("LlamaForCausalLM", "LlamaConfig", _LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralForCausalLM", "MistralConfig", _LLAMA | {"sliding_window": 8}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _LLAMA),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _LLAMA | {"head_dim": 8}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", _LLAMA | {"head_dim": 8}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", _LLAMA | _WINDOW | {
        "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    "gemma3_text": ("Gemma3ForCausalLM", "Gemma3TextConfig", _LLAMA | _WINDOW),
}  # fmt: skip


def random_model(family: str, **changes: Any) -> Any:
    """A Hugging Face model with all weights random, biases and norms too, so that no term of the network vanishes."""
    import transformers

    model_class, config_class, settings = FAMILIES[family]
    config = getattr(transformers, config_class)(**(settings | changes))
    config.architectures = [model_class]
    model = getattr(transformers, model_class)(config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        scale = 0.3 if parameter.ndim == 1 else 1.5 * parameter.shape[-1] ** -0.5
        noise = torch.randn(parameter.shape, generator=generator) * scale
        is_gain = parameter.ndim == 1 and name.endswith("weight") and "gemma" not in family
        parameter.data.copy_(noise + 1 if is_gain else noise)
    return model.eval()


def random_tokens(batch: int = 2, length: int = 13, seed: int = 1) -> torch.Tensor:
    """Token ids [batch, length]."""
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def hooked_transformer(model: Any, processed: bool = True) -> Any:
    """TransformerLens' HookedTransformer with the same weights, converted and processed by TransformerLens itself."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained import weight_conversions as convert

    c = model.config
    heads = c.num_attention_heads
    settings: dict[str, Any] = {
        "d_model": c.hidden_size,
        "d_head": getattr(c, "head_dim", None) or c.hidden_size // heads,
        "n_heads": heads,
        "n_layers": c.num_hidden_layers,
        "n_ctx": c.max_position_embeddings,
        "d_vocab": c.vocab_size,
        "device": "cpu",
        "original_architecture": c.architectures[0],
    }
    to_lens: Callable[..., dict[str, Any]]
    if c.model_type in ("gpt2", "gpt_neo"):
        settings |= {
            "eps": c.layer_norm_epsilon,
            "normalization_type": "LN",
            "act_fn": c.activation_function,
            "d_mlp": 4 * c.hidden_size,
        }
        to_lens = convert.convert_gpt2_weights
        if c.model_type == "gpt_neo":
            settings |= {
                "attn_types": c.attention_layers,
                "use_attn_scale": False,
                "use_local_attn": True,
                "window_size": c.window_size,
            }
            to_lens = convert.convert_neo_weights
    else:
        settings |= {
            "d_mlp": c.intermediate_size,
            "positional_embedding_type": "rotary",
            "rotary_adjacent_pairs": False,
            "rotary_dim": settings["d_head"],
            "rotary_base": 10000,
        }
        if c.model_type == "gpt_neox":
            settings |= {
                "eps": c.layer_norm_eps,
                "normalization_type": "LN",
                "act_fn": c.hidden_act,
                "parallel_attn_mlp": c.use_parallel_residual,
                "rotary_dim": round(c.rope_parameters["partial_rotary_factor"] * settings["d_head"]),
            }
            to_lens = convert.convert_neox_weights
        else:
            settings |= {
                "eps": c.rms_norm_eps,
                "normalization_type": "RMS",
                "final_rms": True,
                "gated_mlp": True,
                "n_key_value_heads": c.num_key_value_heads,
                "act_fn": getattr(c, "hidden_activation", None) or c.hidden_act,
                "use_qk_norm": c.model_type in ("qwen3", "gemma3_text"),
            }
            to_lens = {
                "llama": convert.convert_llama_weights,
                "mistral": convert.convert_mistral_weights,
                "qwen2": convert.convert_qwen2_weights,
                "qwen3": convert.convert_qwen3_weights,
            }.get(c.model_type, convert.convert_gemma_weights)
    if c.model_type in ("gemma2", "gemma3_text"):
        settings |= {
            "use_normalization_before_and_after": True,
            "use_local_attn": True,
            "window_size": c.sliding_window,
            "attn_types": ["local" if "sliding" in kind else "global" for kind in c.layer_types],
        }
        if c.model_type == "gemma2":
            settings |= {
                "attn_scores_soft_cap": c.attn_logit_softcapping,
                "output_logits_soft_cap": c.final_logit_softcapping,
            }
        else:
            settings |= {"rotary_base": 1_000_000, "rotary_base_local": 10_000}
    if c.model_type == "mistral":
        settings |= {"use_local_attn": True, "window_size": c.sliding_window, "attn_types": ["local"] * LAYERS}

    lens = HookedTransformer(HookedTransformerConfig(**settings))
    flags = dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), processed)
    if c.model_type == "gemma2":
        flags["center_unembed"] = False  # as HookedTransformer.from_pretrained does where logits are soft-capped
    lens.load_and_process_state_dict(to_lens(model, lens.cfg), **flags)
    return lens.eval()


def bridge(model: Any, processed: bool = False) -> Any:
    """TransformerLens' TransformerBridge around the model, which it wraps in place."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    bridged = build_bridge_from_module(model, type(model).__name__, hf_config=model.config)
    if processed:
        bridged.enable_compatibility_mode()
    return bridged
