"""Trains the embedded language model: a small GPT-2 on the Python standard library's source and documentation.

``e2e-fast train-lm`` learns a byte-level BPE on the training part, trains a `GPT2LMHeadModel` with AdamW (linear
warm-up, cosine decay to zero) on windows of consecutive tokens, and measures it on the held-out files, beside a unigram
and a bigram model of the same tokens. Written to the folder: `config.json`, `tokenizer.json`, `tokenizer_config.json`,
`model.safetensors` (float16), `training.json` and `README.md`. The loss in them is that of the rounded weights.

Each epoch cuts the text anew, from a random offset, and visits the windows in a random order.

>>> from e2e_fast import train_lm
>>> import numpy as np
>>> ids = np.array([0, 1, 2, 1, 2, 1, 2, 1, 2, 1])
>>> baselines = train_lm.ngram_losses(ids, ids.reshape(2, 5), vocab_size=3)
>>> baselines["bigram"] < baselines["unigram"]
True
"""

import json
import math
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from e2e_fast import embedded
from e2e_fast.embedded import SEPARATOR, corpus

FOLDER = Path(embedded.path())
SAMPLE = 64  # held-out windows whose loss is recorded for a quick check of the weights


def train_lm(
    folder: Annotated[Path, typer.Option(help="Where the model is written.")] = FOLDER,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 6000,
    batch_size: Annotated[int, typer.Option(help="Windows a step.")] = 8,
    n_ctx: Annotated[int, typer.Option(help="Tokens a window, and the model's context.")] = 128,
    vocab_size: Annotated[int, typer.Option(help="Tokens of the byte-level BPE.")] = 2048,
    n_embd: Annotated[int, typer.Option(help="Width of the model.")] = 128,
    n_layer: Annotated[int, typer.Option(help="Blocks.")] = 6,
    n_head: Annotated[int, typer.Option(help="Attention heads.")] = 4,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    seed: Annotated[int, typer.Option(help="Of the initial weights and the order of the windows.")] = 0,
    device: Annotated[str, typer.Option(help='"cpu" or "cuda".')] = "cpu",
    autocast: Annotated[bool, typer.Option(help="Matrix products in bfloat16.")] = True,
) -> None:
    """Train the embedded language model on the Python standard library."""
    for name, value in (("steps", steps), ("batch_size", batch_size), ("n_layer", n_layer), ("n_head", n_head)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if n_embd % n_head:
        raise ValueError(f"n_embd must be a multiple of n_head = {n_head}, got {n_embd}")
    if not 257 <= vocab_size <= 65_536:
        raise ValueError(
            f"vocab_size must lie in [257, 65536], the bytes and the separator to 16 bits, got {vocab_size}"
        )
    started = time.process_time()
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(vocab_size)
    ids = np.concatenate(list(embedded.encode(tokenizer, "train")))
    heldout = windows(np.concatenate(list(embedded.encode(tokenizer, "heldout"))), n_ctx)
    model = gpt2(vocab_size, n_ctx, n_embd, n_layer, n_head).to(device)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{n_parameters:,} parameters; {ids.size:,} training and {heldout.size:,} held-out tokens")
    baselines = ngram_losses(ids, heldout, vocab_size)
    print(f"held-out nats/token: unigram {baselines['unigram']:.4f}, bigram {baselines['bigram']:.4f}", flush=True)

    optimizer = adamw(model, lr)
    batches = random_batches(ids, n_ctx + 1, batch_size, seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule(step, steps)
        batch = torch.from_numpy(next(batches).astype(np.int64)).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            logits = model(batch[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss became {loss.item()} at step {step}; try a lower lr than {lr}")
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 200 == 0:
            print(f"step {step:5d}  train {loss.item():.4f}", flush=True)
        if step % 1000 == 999:
            print(f"step {step + 1:5d}  held-out {heldout_loss(model, heldout[: SAMPLE * 2]):.4f}", flush=True)

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
    n_bytes = sum(len(document.encode()) for _, document in corpus.documents("heldout"))
    loss = heldout_loss(model, heldout)
    record = {
        "command": f"e2e-fast train-lm --steps {steps} --batch-size {batch_size} --n-ctx {n_ctx} "
        f"--vocab-size {vocab_size} --n-embd {n_embd} --n-layer {n_layer} --n-head {n_head} --lr {lr} --seed {seed} "
        f"--device {device} --{'' if autocast else 'no-'}autocast",
        "parameters": n_parameters,
        "training_tokens": steps * batch_size * n_ctx,
        "epochs": round(steps * batch_size * n_ctx / ids.size, 2),
        "cpu_minutes": round((time.process_time() - started) / 60, 1),
        "heldout_tokens": int(heldout.size),
        "heldout_nats_per_token": round(loss, 5),
        "heldout_bits_per_byte": round(loss / math.log(2) * heldout.size / n_bytes, 4),
        "unigram_nats_per_token": round(baselines["unigram"], 4),
        "bigram_nats_per_token": round(baselines["bigram"], 4),
        "sample_windows": SAMPLE,
        "sample_nats_per_token": round(heldout_loss(model, heldout[:SAMPLE]), 5),
        "text_fingerprint": corpus.fingerprint(),
        "python": platform.python_version(),
        "torch": torch.__version__.split("+")[0],
    }
    save(folder, model, tokenizer, record)
    print(json.dumps(record, indent=2))


def train_tokenizer(vocab_size: int) -> Any:
    """A byte-level BPE of GPT-2's kind on the training text; id 0 is the separator."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document for _, document in corpus.documents("train")), trainer)
    return tokenizer


def gpt2(vocab_size: int, n_ctx: int, n_embd: int, n_layer: int, n_head: int) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=n_ctx,
        n_embd=n_embd,
        n_layer=n_layer,
        n_head=n_head,
        initializer_range=0.06,  # GPT-2's 0.02 suits wider models and starts slowly here
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config)


def windows(ids: np.ndarray, length: int) -> np.ndarray:
    """[windows, length]: `ids` cut every `length` tokens, the shorter end dropped."""
    return ids[: len(ids) // length * length].reshape(-1, length)


def random_batches(ids: np.ndarray, length: int, batch_size: int, seed: int) -> Iterator[np.ndarray]:
    """Batches [batch_size, length] without end: every epoch from another offset and in another order."""
    rng = np.random.default_rng(seed)
    while True:
        rows = windows(ids[rng.integers(length) :], length)
        order = rng.permutation(len(rows))
        for start in range(0, len(rows) - batch_size + 1, batch_size):
            yield rows[order[start : start + batch_size]]


def adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Weight decay 0.1 on matrices, none on biases and LayerNorm."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)


def schedule(step: int, steps: int) -> float:
    """Factor of the peak learning rate: linear over the first 3 % of the steps, then a cosine down to zero."""
    warmup = max(1, round(0.03 * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


@torch.no_grad()
def heldout_loss(model: nn.Module, rows: np.ndarray) -> float:
    """Nats per predicted token, float32, over windows [windows, n_ctx] (the first token of each is only context)."""
    device = next(model.parameters()).device
    total = 0.0
    for start in range(0, len(rows), 32):
        batch = torch.from_numpy(rows[start : start + 32].astype(np.int64)).to(device)
        logits: Tensor = model(batch, use_cache=False).logits[:, :-1]
        total += F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    return total / (rows.shape[0] * (rows.shape[1] - 1))


def ngram_losses(ids: np.ndarray, rows: np.ndarray, vocab_size: int) -> dict[str, float]:
    """Nats per predicted token of rows [windows, n_ctx] under n-gram models counted on `ids` [tokens].

    Unigram: add-one. Bigram: ``(count(a, b) + s · unigram(b)) / (count(a) + s)`` with the s that is best on `rows`: a
    head start for the baseline.
    """
    ids = ids.astype(np.int64)
    counts = np.bincount(ids, minlength=vocab_size)
    unigram = (counts + 1) / (counts.sum() + vocab_size)
    pairs = np.bincount(ids[:-1] * vocab_size + ids[1:], minlength=vocab_size**2).reshape(vocab_size, vocab_size)
    before, after = rows[:, :-1].astype(np.int64).ravel(), rows[:, 1:].astype(np.int64).ravel()
    seen, total, prior = pairs[before, after], pairs.sum(1)[before], unigram[after]
    bigram = min(-np.log((seen + s * prior) / (total + s)).mean() for s in (1, 3, 10, 30, 100, 300, 1000))
    return {"unigram": float(-np.log(prior).mean()), "bigram": float(bigram)}


def save(folder: Path, model: nn.Module, tokenizer: Any, record: dict[str, Any]) -> None:
    """Writes a Hugging Face folder with float16 weights that load as float32, and the record of the training."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.half().cpu().contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config: Any = model.config
    config.dtype = torch.float32
    config.architectures = ["GPT2LMHeadModel"]
    (folder / "config.json").write_text(config.to_json_string(use_diff=True))
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), SEPARATOR)
    n_ctx = int(config.n_positions)
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": n_ctx, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    (folder / "README.md").write_text(readme(record))


def readme(record: dict[str, Any]) -> str:
    return f"""# The embedded language model

A GPT-2-style model of {record["parameters"]:,} parameters, trained by this project on the Python standard library's
source and documentation, so that the demo and the tests need no download. Not useful as a language model.

| on the held-out files | nats/token | |
|---|---|---|
| this model | {record["heldout_nats_per_token"]:.3f} | {record["heldout_bits_per_byte"]:.3f} bits/byte |
| bigram model of the same tokens | {record["bigram_nats_per_token"]:.3f} | |
| unigram model | {record["unigram_nats_per_token"]:.3f} | |

Made by

    {record["command"]}

with Python {record["python"]} (text fingerprint `{record["text_fingerprint"]}`) and torch {record["torch"]}, on
{record["training_tokens"]:,} tokens ({record["epochs"]} epochs) in {record["cpu_minutes"]} CPU minutes. Weights are
float16 and load as float32; the losses are those of the rounded weights. All figures are in `training.json`;
`docs/embedded_lm.md` says what the text is. Another Python version has another text and gives slightly other losses.
"""
