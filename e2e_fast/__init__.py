"""Fast end-to-end sparse dictionary learning (Braun et al. 2024).

    model = e2e_fast.SAETransformer(lm, ["blocks.6.hook_resid_pre"], dict_size_to_input_ratio=60)
    run = e2e_fast.train("config.yaml")                    local, e2e and e2e+downstream SAEs
    run = e2e_fast.finetune("out/my_local_run", samples)   a short fine-tune on the KL
    metrics = e2e_fast.evaluate(run.model, tokens)
    lm = e2e_fast.load_lm("gpt2")                          a frozen model, cut at a TransformerLens position
    m = e2e_fast.match_dictionaries(A, B)                  exact one-to-one matching, with its proof

Names are loaded on first use: ``import e2e_fast`` imports neither torch's compiler nor any language-model library.

>>> import e2e_fast
>>> e2e_fast.__version__
'0.1.0'
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "SAE": "sae",
    "SAETransformer": "sae_transformer",
    "Config": "config",
    "ConfigError": "config",
    "load_config": "config",
    "LossConfig": "losses",
    "load_lm": "lm",
    "train": "trainer",
    "Run": "trainer",
    "Trainer": "trainer",
    "LocalTrainer": "trainer",
    "E2ETrainer": "trainer",
    "E2EDownstreamTrainer": "trainer",
    "TrainingStopped": "trainer",
    "TrainingTerminated": "trainer",
    "evaluate": "evaluation",
    "finetune": "finetuning",
    "DownloadError": "download",
    "MissingPackage": "optional",
    "match_dictionaries": "compare",
    "Matching": "compare",
}
_MODULES = ("kernels", "losses", "embedded", "compare")

__all__ = [
    "SAE",
    "Config",
    "ConfigError",
    "DownloadError",
    "E2EDownstreamTrainer",
    "E2ETrainer",
    "LocalTrainer",
    "LossConfig",
    "Matching",
    "MissingPackage",
    "Run",
    "SAETransformer",
    "Trainer",
    "TrainingStopped",
    "TrainingTerminated",
    "__version__",
    "compare",
    "embedded",
    "evaluate",
    "finetune",
    "kernels",
    "load_config",
    "load_lm",
    "losses",
    "match_dictionaries",
    "train",
]

if TYPE_CHECKING:
    from e2e_fast import compare, embedded, kernels, losses
    from e2e_fast.compare import Matching, match_dictionaries
    from e2e_fast.config import Config, ConfigError, load_config
    from e2e_fast.download import DownloadError
    from e2e_fast.evaluation import evaluate
    from e2e_fast.finetuning import finetune
    from e2e_fast.lm import load_lm
    from e2e_fast.losses import LossConfig
    from e2e_fast.optional import MissingPackage
    from e2e_fast.sae import SAE
    from e2e_fast.sae_transformer import SAETransformer
    from e2e_fast.trainer import (
        E2EDownstreamTrainer,
        E2ETrainer,
        LocalTrainer,
        Run,
        Trainer,
        TrainingStopped,
        TrainingTerminated,
        train,
    )


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"e2e_fast.{_HOME[name]}"), name)
    if name in _MODULES:
        return import_module(f"e2e_fast.{name}")
    raise AttributeError(f"module 'e2e_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
