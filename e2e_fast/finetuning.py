"""Most of an end-to-end SAE for a few percent of its cost: fine-tune a trained one on the KL.

    loss = ½ (MSE + stopgrad(MSE / KL) · KL) + sparsity        `losses.balanced` (Karvonen 2025, arXiv 2503.17272)

It goes on from the weights of a run, with a new Adam, and writes them back in the format that they came in.

>>> import e2e_fast                                                                    # doctest: +SKIP
>>> run = e2e_fast.finetune("out/my_local_run", samples=20_000)                        # doctest: +SKIP
>>> run.folder, run.history[-2]["loss/train/logits_kl"]                                # doctest: +SKIP
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from e2e_fast import checkpoint, losses
from e2e_fast.config import Config, load_config
from e2e_fast.lm import load_lm
from e2e_fast.positions import resolve_positions
from e2e_fast.sae import SAETransformer, to_e2e_sae
from e2e_fast.trainer import Run, Trainer


def finetune(
    sae: "SAETransformer | str | Path",
    samples: int,
    *,
    lr: float = 5e-5,
    sparsity: float | None = None,
    downstream: bool = False,
    tokens: "Tensor | np.ndarray | None" = None,
    lm: Any = None,
    quiet: bool = False,
    **settings: Any,
) -> Run:
    """Trains a finished SAE for ``samples`` more sequences on the balanced loss.

    sae: a run folder of ours or of e2e_sae, one of its weight files, or an SAETransformer (left as it is). The result
    is a run folder beside the source's, or in ``save_dir``, with weights of the source's kind (``.safetensors``,
    ``.pt``); an SAETransformer's is saved where ``save_dir`` says, or not at all. lr: its peak, from which it falls
    as the run's ``lr_schedule`` says. sparsity: the coefficient; None keeps the run's, which is right after local
    training, whose scale the balanced loss has. downstream: also minimise the MSE at later positions, the run's or
    all. tokens [samples, T] replace the run's ``train_data``, which else is drawn in another order (its seed + 1).
    ``lm`` replaces the model. ``settings`` are further configuration keys, e.g. ``warmup_samples=2000``.

    Raises ValueError when an SAETransformer comes without ``sparsity`` or without tokens and train_data;
    FileNotFoundError and ConfigError for a folder that cannot be read.
    """
    if isinstance(sae, SAETransformer):
        base, state, suffix = _of_transformer(sae, sparsity, tokens, settings), to_e2e_sae(sae.by_position), None
        lm = sae.lm if lm is None else lm
    else:
        base, state, suffix = _of_folder(Path(sae))
        lm = load_lm(base.model if lm is None else lm, processing=base.lm_processing)
    name = "balanced+downstream" if downstream else "balanced"
    at = resolve_positions(base.saes.sae_positions, lm.positions())
    loss = base.loss
    if sparsity is not None:
        loss = loss.model_copy(update={"sparsity": loss.sparsity.model_copy(update={"coeff": sparsity})})
    config = base.replace(
        **{
            "loss": losses.named(name, loss, at, lm.positions()).model_dump(),
            "lr": lr,
            "n_samples": samples,
            "saes": base.saes.model_dump() | {"dict_size_to_input_ratio": _ratio(state)},
            **settings,
        }
    )
    run = Trainer(config, lm, tokens, state, quiet=quiet).fit()
    if suffix == ".pt" and run.folder is not None:
        _, weights = checkpoint.newest(run.folder)
        checkpoint.save_tensors(weights.with_suffix(".pt"), to_e2e_sae(run.model.by_position))
        weights.unlink()
    return run


def _of_folder(path: Path) -> tuple[Config, dict[str, Tensor], str]:
    """Configuration, weights and the weight file's suffix of a run."""
    settings, state = checkpoint.read_run(path)
    file = path if path.is_file() else checkpoint.newest(path)[1]
    source = load_config(settings)
    data = source.train_data
    seed = source.seed if data.seed is None else data.seed
    config = source.replace(
        wandb_run_name=f"{source.run_name}_finetuned",
        wandb_run_name_prefix="",
        save_dir=file.parent.parent,
        schedule=None,
        warmup_samples=0,
        cooldown_samples=0,
        train_data=data.model_dump() | {"seed": seed + 1},
        saes=source.saes.model_dump() | {"pretrained_sae_paths": None},
    )
    return config, state, file.suffix


def _of_transformer(
    model: SAETransformer, sparsity: float | None, tokens: "Tensor | np.ndarray | None", settings: Mapping[str, Any]
) -> Config:
    if sparsity is None:
        raise ValueError("sparsity must be given for an SAETransformer, which does not know its coefficient; got None")
    if tokens is None and "train_data" not in settings:
        raise ValueError("an SAETransformer needs tokens= or train_data= to be fine-tuned on, got neither")
    n_ctx = model.lm.n_ctx if tokens is None else tokens.shape[1]
    data = {"dataset_name": "given", "tokenizer_name": "none", "split": "train", "n_ctx": n_ctx}
    return load_config(
        {
            "tlens_model_name": model.lm.name,
            "lm_processing": model.lm.processing,
            "save_dir": None,
            "n_samples": 1,
            "save_every_n_samples": None,
            "eval_n_samples": None,
            "batch_size": 8,
            "lr": 1.0,
            "loss": losses.balanced(sparsity).model_dump(),
            "train_data": settings.get("train_data", data),
            "saes": {
                "sae_positions": model.all_sae_positions,
                **next(iter(model.by_position.values())).settings,
            },
        }
    )


def _ratio(state: Mapping[str, Tensor]) -> float:
    """The ``dict_size_to_input_ratio`` that gives the dictionary size of these weights."""
    d_sae, d_in = next(value.shape for key, value in state.items() if key.endswith("encoder.0.weight"))
    ratio = d_sae / d_in
    return ratio if int(ratio * d_in) == d_sae else (d_sae + 0.5) / d_in
