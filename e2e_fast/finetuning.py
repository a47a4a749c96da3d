"""Most of an end-to-end SAE for a few percent of its cost: fine-tune a trained one on the KL.

    loss = ½ (MSE + stopgrad(MSE / KL) · KL) + sparsity        `losses.balanced` (Karvonen 2025, arXiv 2503.17272)

It goes on from the weights of a run, or of a file of SAELens, dictionary_learning or sparsify, with a new Adam, and
writes them back in the format that they came in: the library that made the file loads the result.

>>> import e2e_fast                                                                            # doctest: +SKIP
>>> run = e2e_fast.finetune("out/my_local_run", samples=20_000)                                # doctest: +SKIP
>>> run = e2e_fast.finetune("theirs/layers.6", samples=20_000, train_data=data, batch_size=8)  # doctest: +SKIP
>>> run.folder, run.history[-2]["loss/train/logits_kl"]                                        # doctest: +SKIP
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from e2e_fast import checkpoint, files, formats, losses
from e2e_fast.config import Config, load_config
from e2e_fast.distributed import join
from e2e_fast.formats import StoredSAE, e2e_sae
from e2e_fast.lm import LM, load_lm
from e2e_fast.positions import resolve_positions
from e2e_fast.sae import SAE, to_e2e_sae
from e2e_fast.sae_transformer import SAETransformer
from e2e_fast.sources import token_array
from e2e_fast.trainer import Run, Trainer


def finetune(
    sae: "SAETransformer | SAE | StoredSAE | str | Path",
    samples: int,
    *,
    lr: float = 5e-5,
    sparsity: float | None = None,
    downstream: bool = False,
    tokens: "Tensor | np.ndarray | None" = None,
    lm: Any = None,
    position: str | None = None,
    lm_processing: str | None = None,
    quiet: bool = False,
    **settings: Any,
) -> Run:
    """Trains a finished SAE for ``samples`` more sequences on the balanced loss.

    sae: a run folder of ours or of e2e_sae, one of its weight files, a file or folder of another library
    (`e2e_fast.formats`), or an SAE in memory (left as it is). The result is a new folder beside the source's, or in
    ``save_dir``, with weights of the source's kind; what was in memory is saved where ``save_dir`` says, or not at all.
    lr: its peak, from which it falls as the run's ``lr_schedule`` says. sparsity: the coefficient; None keeps the
    run's, which is right after local training, whose scale the balanced loss has. Where there is no run it must be
    given, but for SAEs with a k, where it is 0; jump-relu SAEs are penalised by their L0. downstream: also minimise the
    MSE at later positions, the run's or all. tokens [samples, T] replace the run's ``train_data``, which else is drawn
    in another order (its seed + 1). ``lm`` replaces the model; ``position`` and ``lm_processing`` ("transformer_lens"
    or "none") what another library's file says, or leaves out. ``settings`` are further configuration keys, e.g.
    ``warmup_samples=2000``; of ``saes`` those to change, e.g. ``saes={"bandwidth": 0.01}`` for jump-relu.

    Raises ValueError when something of this is not known, and for an SAE that its format could not take back;
    FileNotFoundError and ConfigError for a folder that cannot be read.
    """
    place = {"position": position, "lm_processing": lm_processing}
    tokens = None if tokens is None else token_array(tokens)
    if isinstance(sae, SAETransformer):
        _refuse(place, "an SAETransformer, which has them")
        source = _of_transformer(sae, lm, sparsity, tokens, settings)
    elif isinstance(sae, SAE):
        source = _of_stored(StoredSAE.of(sae), lm, place, sparsity, tokens, settings)
    elif isinstance(sae, StoredSAE):
        source = _of_stored(sae, lm, place, sparsity, tokens, settings)
    elif isinstance(sae, (str, Path)) and _is_run(sae):
        _refuse(place, "a run, whose configuration has them")
        source = _of_run(Path(sae), lm)
    elif isinstance(sae, (str, Path)):
        source = _of_stored(formats.read(sae), lm, place, sparsity, tokens, settings, path=formats.split_name(sae)[0])
    else:
        raise ValueError(f"sae must be a path, an SAETransformer, an SAE or a StoredSAE, got a {type(sae).__name__}")
    run = Trainer(_config(source, samples, lr, sparsity, downstream, settings), source.lm, tokens, source.state,
                  quiet=quiet).fit()  # fmt: skip
    if run.folder is not None and join().writes:
        _write_back(run, source)
    return run


class _Source(NamedTuple):
    """What is trained."""

    config: Config
    """Of a run, with what a fine-tune changes still to come."""
    state: dict[str, Tensor]
    """Weights under e2e_sae's keys."""
    lm: LM
    suffix: str = ".safetensors"
    """Of the weight file, in e2e_sae's format."""
    like: StoredSAE | None = None
    """The SAE of another format's file."""


def _config(
    source: _Source, samples: int, lr: float, sparsity: float | None, downstream: bool, settings: Mapping[str, Any]
) -> Config:
    base, positions = source.config, source.lm.positions()
    loss = base.loss
    if sparsity is not None:
        loss = loss.model_copy(update={"sparsity": loss.sparsity.model_copy(update={"coeff": sparsity})})
    at = resolve_positions(base.saes.sae_positions, positions)
    ratio = _ratio(source.state)
    kind = "balanced+downstream" if downstream else "balanced"
    return base.replace(
        **{
            "loss": losses.named(kind, loss, at, positions).model_dump(),
            "lr": lr,
            "n_samples": samples,
            **settings,
            "saes": base.saes.model_dump() | {"dict_size_to_input_ratio": ratio} | settings.get("saes", {}),
        }
    )


# ------------------------------------------------------------------------------------------------------------ sources


def _is_run(path: str | Path) -> bool:
    """Whether a path is a run with the configuration of its training, or nothing at all, which a run's reader says."""
    place, _ = formats.split_name(path)
    if not formats.is_run(path):
        return not place.exists()
    config = (place if place.is_dir() else place.parent) / e2e_sae.SETTINGS
    return "loss" in files.load_yaml(config)


def _of_run(path: Path, lm: Any) -> _Source:
    settings, state = checkpoint.read_run(path)
    file = path if path.is_file() else checkpoint.newest(path)[1]
    run = load_config(settings)
    data = run.train_data
    seed = run.seed if data.seed is None else data.seed
    config = run.replace(
        wandb_run_name=f"{run.run_name}_finetuned",
        wandb_run_name_prefix="",
        save_dir=file.parent.parent,
        schedule=None,
        warmup_samples=0,
        cooldown_samples=0,
        train_data=data.model_dump() | {"seed": seed + 1},
        saes=run.saes.model_dump() | {"pretrained_sae_paths": None},
    )
    lm = load_lm(config.model if lm is None else lm, processing=config.lm_processing)
    return _Source(config, state, lm, file.suffix)


def _of_transformer(
    model: SAETransformer,
    lm: Any,
    sparsity: float | None,
    tokens: "Tensor | np.ndarray | None",
    settings: Mapping[str, Any],
    **more: Any,
) -> _Source:
    """``more``: further keys of the configuration."""
    saes = list(model.by_position.values())
    if sparsity is None and any(sae.k is None for sae in saes):
        raise ValueError(
            f"sparsity must be given for an SAE without k ({saes[0].activation}) whose run is not known; got None"
        )
    if tokens is None and "train_data" not in settings:
        raise ValueError("an SAE whose run is not known needs tokens= or train_data= to be fine-tuned on, got neither")
    n_ctx = model.lm.n_ctx if tokens is None else tokens.shape[1]
    data = {"dataset_name": "given", "tokenizer_name": "none", "split": "train", "n_ctx": n_ctx}
    loss = losses.balanced(sparsity or 0.0).model_dump()
    if all(sae.activation == "jump_relu" for sae in saes):
        loss["sparsity"]["p_norm"] = 0.0
    config = load_config(
        {
            "tlens_model_name": model.lm.name,
            "lm_processing": model.lm.processing,
            "save_dir": None,
            "n_samples": 8,
            "save_every_n_samples": None,
            "eval_n_samples": None,
            "batch_size": 8,
            "lr": 1.0,
            "loss": loss,
            "train_data": settings.get("train_data", data),
            "saes": {"sae_positions": model.all_sae_positions, **saes[0].settings},
            **more,
        }
    )
    lm = model.lm if lm is None else load_lm(lm, processing=model.lm.processing)
    return _Source(config, to_e2e_sae(model.by_position), lm)


def _of_stored(
    sae: StoredSAE,
    lm: Any,
    place: Mapping[str, Any],
    sparsity: float | None,
    tokens: "Tensor | np.ndarray | None",
    settings: Mapping[str, Any],
    path: Path | None = None,
) -> _Source:
    model = SAETransformer.from_stored(sae, lm=lm, **place)
    like = replace(
        sae,
        position=model.all_sae_positions[0],
        model=sae.model or model.lm.name,
        lm_processing=model.lm.processing,
    )
    if like.format:
        formats.adapt(like, like.format, like)  # what could not be written back is not trained
    more: dict[str, Any] = {}
    if path is not None:
        more = {"save_dir": path.parent, "wandb_run_name": f"{path.name if path.is_dir() else path.stem}_finetuned"}
    source = _of_transformer(model, None, sparsity, tokens, settings, **more)
    if like.format == e2e_sae.NAME:
        return source._replace(suffix=Path(like.metadata["file"]).suffix)
    return source._replace(like=like if like.format else None)


def _refuse(place: Mapping[str, Any], kind: str) -> None:
    for name, value in place.items():
        if value is not None:
            raise ValueError(f"{name} is for files of other libraries, got {value!r} with {kind}")


def _ratio(state: Mapping[str, Tensor]) -> float:
    """The ``dict_size_to_input_ratio`` that gives the dictionary size of these weights."""
    d_sae, d_in = next(value.shape for key, value in state.items() if key.endswith("encoder.0.weight"))
    return e2e_sae.ratio(d_sae, d_in)


# ------------------------------------------------------------------------------------------------------------- result


def _write_back(run: Run, source: _Source) -> None:
    """Puts weights of the source's kind in place of the run's, once they are written."""
    assert run.folder is not None
    _, weights = checkpoint.newest(run.folder)
    if source.like is not None:
        like = source.like
        sae = next(iter(run.model.by_position.values()))
        trained = StoredSAE.of(sae, position=like.position, model=like.model, lm_processing=like.lm_processing)
        formats.module(like.format).write(formats.adapt(trained, like.format, like), run.folder)
        for path in [*run.folder.glob("samples_*.safetensors"), *run.folder.glob("resume_*.safetensors")]:
            path.unlink()
    elif source.suffix == ".pt":
        files.save_tensors(weights.with_suffix(".pt"), to_e2e_sae(run.model.by_position))
        weights.unlink()
