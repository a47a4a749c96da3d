"""The smallest language models, tokens and settings on which a training shows all that it does."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

VOCABULARY, N_CTX = 61, 16
AT, LATER, LAST = (f"blocks.{i}.hook_resid_pre" for i in (1, 2, 3))


def gpt2(**changes: Any) -> Any:
    """GPT-2 with random weights: 4 blocks of width 32, 61 tokens, contexts of up to 16."""
    size: dict[str, Any] = {"n_layer": 4, "n_embd": 32, "n_head": 2, "n_positions": N_CTX, "vocab_size": VOCABULARY}
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**(size | changes)))


def llama() -> Any:
    """A Llama of the same size."""
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            num_hidden_layers=4, hidden_size=32, intermediate_size=64, num_attention_heads=2,
            max_position_embeddings=N_CTX, vocab_size=VOCABULARY,
        )
    )  # fmt: skip


def tokens(samples: int = 96, n_ctx: int = N_CTX, vocabulary: int = VOCABULARY) -> np.ndarray:
    return np.random.default_rng(0).integers(vocabulary, size=(samples, n_ctx))


def loss(**terms: Any) -> dict[str, Any]:
    """Sparsity alone, but for what is given: ``logits_kl={"coeff": 1.0}`` …"""
    nothing = {"in_to_orig": None, "out_to_orig": None, "out_to_in": None, "logits_kl": None}
    return {"sparsity": {"coeff": 0.2}, **nothing, **terms}


E2E = loss(out_to_in={"coeff": 0.0}, logits_kl={"coeff": 1.0})
DOWNSTREAM = E2E | {"in_to_orig": {"total_coeff": 1.0, "hook_positions": [LATER]}}


def settings(save_dir: Path | None = None, **changes: Any) -> dict[str, Any]:
    """An e2e run of six optimizer steps of two micro-batches on given tokens: logs every step, saves the end."""
    return {
        "tlens_model_name": "tiny",
        "save_dir": save_dir,
        "n_samples": 48,
        "save_every_n_samples": None,
        "eval_n_samples": None,
        "batch_size": 4,
        "effective_batch_size": 8,
        "lr": 1e-3,
        "max_grad_norm": 1.0,
        "log_every_n_grad_steps": 1,
        "collect_act_frequency_every_n_samples": 0,
        "loss": E2E,
        "train_data": {"dataset_name": "given", "tokenizer_name": "none", "split": "train", "n_ctx": N_CTX},
        "saes": {"sae_positions": AT, "dict_size_to_input_ratio": 3.0},
    } | changes
