"""The main job on real models and real text, through the command line: e2e SAEs hurt the model less than local ones."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from e2e_fast import cli

AT = "blocks.2.hook_resid_pre"


def settings(shared: Path, out: Path, model: str, text: str, n_ctx: int, n_samples: int) -> dict[str, Any]:
    data = {
        "dataset_name": str(shared / text),
        "tokenizer_name": str(shared / "models" / model),
        "split": "train",
        "n_ctx": n_ctx,
        "is_tokenized": False,
    }
    return {
        "tlens_model_path": str(shared / "models" / model),
        "save_dir": str(out),
        "n_samples": n_samples,
        "save_every_n_samples": None,
        "eval_every_n_samples": n_samples,
        "eval_n_samples": 32,
        "eval_data": data,
        "batch_size": 16,
        "lr": 2e-3,
        "warmup_samples": n_samples // 20,
        "max_grad_norm": 1.0,
        "collect_act_frequency_every_n_samples": 0,
        "train_data": data,
        "saes": {"sae_positions": AT, "dict_size_to_input_ratio": 8.0},
    }


def loss(kind: str, coeff: float) -> dict[str, Any]:
    terms = dict.fromkeys(("in_to_orig", "out_to_orig", "out_to_in", "logits_kl"))
    if kind == "local":
        terms["out_to_in"] = {"coeff": 1.0}
    else:
        terms["logits_kl"] = {"coeff": 1.0 if kind == "e2e" else 0.5}
    if kind == "e2e+downstream":
        terms["in_to_orig"] = {"total_coeff": 2.5, "hook_positions": ["blocks.3.hook_resid_pre"]}
    return {"sparsity": {"coeff": coeff}, **terms}


def train(folder: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    """(L0, CE increase) that ``e2e-fast train`` reports in its last evaluation."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    monkeypatch.setattr(sys, "argv", ["e2e-fast", "train", str(path), "--quiet"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert not exit_.value.code
    (run,) = Path(config["save_dir"]).iterdir()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if f"sparsity/eval/L_0/{AT}" in row][-1]
    return last[f"sparsity/eval/L_0/{AT}"], -last["performance/eval/difference_ce_loss"]


@pytest.mark.shared
@pytest.mark.parametrize(
    ("model", "text", "n_ctx", "n_samples", "coeffs"),
    [
        ("stories260K", "text/tinystories.txt", 128, 1600, {"local": 0.8, "e2e": 3.0, "e2e+downstream": 6.0}),
        ("tiny-gpt2", "models/tiny-gpt2/corpus.txt", 64, 4800, {"local": 0.8, "e2e": 1.5, "e2e+downstream": 4.0}),
    ],
    ids=["stories260K", "tiny-gpt2"],
)
def test_e2e_reaches_a_lower_ce_increase_than_local_at_no_more_active_features(
    shared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    text: str,
    n_ctx: int,
    n_samples: int,
    coeffs: dict[str, float],
) -> None:
    reached = {}
    for kind, coeff in coeffs.items():
        folder = tmp_path / kind
        folder.mkdir()
        config = settings(shared, folder / "out", model, text, n_ctx, n_samples) | {"loss": loss(kind, coeff)}
        reached[kind] = train(folder, config, monkeypatch)
        print(f"{model:12} {kind:15} coeff {coeff:<4} L0 {reached[kind][0]:6.1f}  CE increase {reached[kind][1]:.4f}")
    for kind in ("e2e", "e2e+downstream"):
        assert reached[kind][0] <= reached["local"][0], kind
        assert reached[kind][1] < reached["local"][1], kind
