"""The configuration: e2e_sae's files load unchanged, and mistakes are named."""

from pathlib import Path
from typing import Any

import pytest
import yaml

import e2e_fast
from e2e_fast.config import ConfigError
from e2e_fast.schedule import lr_factor

PUBLISHED = """
wandb_project: gpt2-e2e
wandb_run_name: null
wandb_run_name_prefix: "recon_"
seed: 0
tlens_model_name: gpt2-small
tlens_model_path: null
save_every_n_samples: null
n_samples: 400_000
eval_n_samples: 500
eval_every_n_samples: 40_000
log_every_n_grad_steps: 20
collect_output_metrics_every_n_samples: 0
collect_act_frequency_every_n_samples: 40_000
act_frequency_n_tokens: 500_000
batch_size: 8
effective_batch_size: 16
lr: 5e-4
lr_schedule: cosine
min_lr_factor: 0.1
warmup_samples: 20_000
cooldown_samples: 0
max_grad_norm: 10.0
loss:
  sparsity:
    p_norm: 1.0
    coeff: 1.5
  in_to_orig:
    hook_positions:
      - blocks.7.hook_resid_pre
      - blocks.8.hook_resid_pre
    total_coeff: 2.5
  out_to_orig: null
  out_to_in:
    coeff: 0.0
  logits_kl:
    coeff: 0.5
train_data:
  dataset_name: apollo-research/Skylion007-openwebtext-tokenizer-gpt2
  n_ctx: 1024
  tokenizer_name: gpt2
  is_tokenized: true
  streaming: true
  split: train
  column_name: input_ids
eval_data:
  dataset_name: apollo-research/Skylion007-openwebtext-tokenizer-gpt2
  n_ctx: 1024
  tokenizer_name: gpt2
  is_tokenized: true
  streaming: true
  split: train
saes:
  retrain_saes: false
  pretrained_sae_paths: null
  sae_positions: blocks.6.hook_resid_pre
  dict_size_to_input_ratio: 60.0
"""


def published(**changes: Any) -> dict[str, Any]:
    settings = yaml.safe_load(PUBLISHED)
    for key, value in changes.items():
        *parents, leaf = key.split("__")
        target = settings
        for parent in parents:
            target = target[parent]
        target[leaf] = value
    return settings


def without(*path: str) -> dict[str, Any]:
    settings = published()
    target = settings
    for key in path[:-1]:
        target = target[key]
    del target[path[-1]]
    return settings


def test_a_published_configuration_loads_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "gpt2_e2e_recon.yaml"
    path.write_text(PUBLISHED)
    config = e2e_fast.load_config(path)
    assert (config.lr, config.n_samples, config.n_gradient_accumulation_steps) == (5e-4, 400_000, 2)
    assert config.saes.sae_positions == ("blocks.6.hook_resid_pre",)
    assert config.loss.kind == "e2e+downstream"
    assert config.run_name.startswith("recon_seed-0_lpcoeff-1.5_logits-kl-0.5_in-to-orig-2.5_lr-0.0005_ratio-60.0")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (published(learning_rate=1), "learning_rate: unknown key"),
        (published(lr_schedul="linear"), "lr_schedul: unknown key (did you mean lr_schedule?)"),
        (published(loss__logits_kl={"coef": 1}), "loss.logits_kl.coef: unknown key (did you mean coeff?)"),
        (without("batch_size"), "batch_size: missing"),
        (without("eval_n_samples"), "eval_n_samples: missing"),
        (without("loss", "out_to_in"), "loss.out_to_in: missing"),
        (published(lr=-1), "lr: Input should be greater than 0; got -1"),
        (published(effective_batch_size=12), "effective_batch_size must be a multiple of batch_size (8), got 12"),
        (published(tlens_model_path="model"), "exactly one of tlens_model_name and tlens_model_path"),
        (published(n_samples=None), "'cosine' needs n_samples"),
        (published(cooldown_samples=8), "'cosine' needs cooldown_samples 0, got 8"),
        (published(eval_data=None), "eval_every_n_samples needs eval_data"),
        (published(saes__sae_positions=[]), "saes.sae_positions"),
        (published(saes__sae_positions=""), "saes.sae_positions.0: String should have at least 1 character"),
        (published(saes__dict_size_to_input_ratio=float("inf")), "ratio: Input should be a finite number; got inf"),
        (published(lr=float("inf")), "lr: Input should be a finite number; got inf"),
        (published(loss__sparsity__coeff=float("inf")), "coeff: Input should be a finite number; got inf"),
        (published(loss__in_to_orig={"total_coeff": 1, "hook_positions": []}), "hook_positions: Tuple should have at"),
        (published(seed=2**63), "seed: Input should be less than 9223372036854775808"),
    ],
)
def test_a_mistake_is_named_with_its_key(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        e2e_fast.load_config(settings)
    assert message in str(error.value)


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file"):
        e2e_fast.load_config(tmp_path / "nothing.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1,")
    with pytest.raises(ConfigError, match="not valid YAML"):
        e2e_fast.load_config(broken)
    broken.write_text("- 1")
    with pytest.raises(ConfigError, match="must hold a mapping"):
        e2e_fast.load_config(broken)


def test_the_cosine_schedule_starts_at_zero_and_ends_at_the_floor() -> None:
    config = e2e_fast.load_config(published(n_samples=1600, warmup_samples=160))
    assert [lr_factor(config, s) for s in (0, 5, 10)] == [0.0, 0.5, 1.0]
    assert lr_factor(config, 55) == pytest.approx(0.55)
    assert lr_factor(config, 100) == pytest.approx(0.1)


def test_the_linear_schedule_warms_up_stays_and_cools_down() -> None:
    config = e2e_fast.load_config(
        published(lr_schedule="linear", n_samples=1600, warmup_samples=160, cooldown_samples=160, min_lr_factor=0.0)
    )
    assert [lr_factor(config, s) for s in (0, 9, 50, 90, 95)] == [0.1, 1.0, 1.0, 1.0, 0.5]
