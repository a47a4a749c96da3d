"""Several SAEs in one process: each as if trained alone, on one pass of the language model a batch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import e2e_fast
from e2e_fast import checkpoint, kernels, losses, step
from e2e_fast.config import ConfigError
from e2e_fast.lm import LM
from e2e_fast.sae import to_e2e_sae

POSITIONS = [f"blocks.{i}.hook_resid_pre" for i in range(4)]
SWEEPS: list[dict[str, Any]] = [
    {"sparsity_coeff": [0.1, 1.0], "seed": [0, 3]},
    {"dict_size_to_input_ratio": [2.0, 3.0], "k": [4, 8]},
    {"sae_positions": [POSITIONS[2], POSITIONS[1], [POSITIONS[1], POSITIONS[2]]]},
]


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=4, n_embd=32, n_head=2, n_positions=16, vocab_size=61)
    return transformers.GPT2LMHeadModel(config)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(61, size=(40, 16)).astype(np.uint16))
    return folder


def settings(files: Path, **changes: Any) -> dict[str, Any]:
    data = {"dataset_name": str(files / "tokens.npy"), "tokenizer_name": "-", "split": "train", "n_ctx": 16}
    base: dict[str, Any] = {
        "tlens_model_name": "tiny",
        "save_dir": None,
        "seed": 7,
        "n_samples": 32,
        "save_every_n_samples": None,
        "eval_every_n_samples": 16,
        "eval_n_samples": 8,
        "batch_size": 4,
        "effective_batch_size": 8,
        "lr": 1e-2,
        "max_grad_norm": 1.0,
        "log_every_n_grad_steps": 1,
        "collect_act_frequency_every_n_samples": 16,
        "act_frequency_n_tokens": 100,
        "loss": losses.e2e_downstream(0.2, (POSITIONS[3],)).model_dump(),
        "train_data": data,
        "eval_data": data,
        "saes": {"sae_positions": POSITIONS[1], "dict_size_to_input_ratio": 3.0},
    }
    return base | changes


def assert_equal(ours: e2e_fast.Run, theirs: e2e_fast.Run) -> None:
    expected = to_e2e_sae(theirs.model.by_position)
    got = to_e2e_sae(ours.model.by_position)
    assert got.keys() == expected.keys()
    for key, value in got.items():
        assert torch.equal(value, expected[key]), key
    assert ours.history == theirs.history


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda sweep: "-".join(sweep))
@pytest.mark.parametrize("schedule", [None, [{"until": 0.5, "loss": "local"}, {"loss": "balanced"}]])
@pytest.mark.parametrize("share_logits", [True, False], ids=["shared logits", ""])
def test_a_member_of_a_sweep_has_the_bits_of_a_separate_run(
    model: Any, files: Path, sweep: dict[str, Any], schedule: Any, share_logits: bool
) -> None:
    sweep = sweep | {"share_logits": share_logits}
    config = e2e_fast.load_config(settings(files, sweep=sweep, schedule=schedule))
    runs: Any = e2e_fast.train(config, lm=model, quiet=True)
    assert len(runs) == len(config.members) > 1
    alone = [e2e_fast.train(member, lm=model, quiet=True) for member in config.members.values()]
    for ours, theirs in zip(runs, alone, strict=True):
        assert_equal(ours, theirs)
    assert len({json.dumps(run.history) for run in runs}) == len(runs)


def test_a_member_without_a_seed_of_its_own_is_the_plain_run(model: Any, files: Path) -> None:
    runs: Any = e2e_fast.train(settings(files, sweep={"sparsity_coeff": [0.1, 0.2]}), lm=model, quiet=True)
    assert_equal(runs[1], e2e_fast.train(settings(files), lm=model, quiet=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_shared_logits_give_the_bits_of_logits_formed_for_each_member(model: Any, files: Path, precision: str) -> None:
    runs = {}
    for share_logits in (True, False):
        sweep = {"seed": [0, 1, 2], "share_logits": share_logits}
        loss = losses.e2e(0.2, kl=0.7).model_dump()  # no power of 2, so that an other order of products would round
        changes: dict[str, Any] = {"sweep": sweep, "precision": precision, "loss": loss, "effective_batch_size": 12}
        runs[share_logits] = e2e_fast.train(settings(files, n_samples=36, **changes), lm=model, quiet=True)
    for ours, theirs in zip(runs[True], runs[False], strict=True):
        assert_equal(ours, theirs)


class Calls:
    """Counts calls of a function."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        self.n = 0
        function = getattr(owner, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            self.n += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)


def test_a_batch_takes_one_original_pass_and_one_set_of_teacher_logits(
    model: Any, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = Calls(monkeypatch, LM, "original")
    alone = Calls(monkeypatch, kernels, "linear_kl")
    shared = Calls(monkeypatch, step, "share_kl")
    changes = {"eval_every_n_samples": None, "collect_act_frequency_every_n_samples": 0}
    e2e_fast.train(settings(files, sweep={"seed": [0, 1, 2]}, **changes), lm=model, quiet=True)
    assert (passes.n, shared.n, alone.n) == (8, 8, 0)
    sweep = {"seed": [0, 1, 2], "share_logits": False}
    e2e_fast.train(settings(files, sweep=sweep, **changes), lm=model, quiet=True)
    assert (passes.n, shared.n, alone.n) == (16, 8, 3 * 8)


def test_evaluation_and_final_counts_take_one_original_pass_a_batch(
    model: Any, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = Calls(monkeypatch, LM, "original")
    e2e_fast.train(settings(files, sweep={"seed": [0, 1, 2]}), lm=model, quiet=True)
    # Eight of training; evaluations after the first batch, in the middle and at the end, two batches each; 100 tokens
    # of the final count are two batches.
    assert passes.n == 8 + 3 * 2 + 2


def test_each_member_has_a_run_folder_and_the_whole_is_resumed(model: Any, files: Path, tmp_path: Path) -> None:
    sweep = {"sparsity_coeff": [0.1, 1.0], "sae_positions": [POSITIONS[1], POSITIONS[1:3]]}
    changes: dict[str, Any] = {"sweep": sweep, "save_every_n_samples": 16, "save_dir": tmp_path, "keep_checkpoints": 2}
    whole: Any = e2e_fast.train(settings(files, **changes), lm=model, quiet=True)
    (folder,) = tmp_path.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == [
        "final_config.yaml",
        "sparsity_coeff-0.1_sae_positions-blocks.1.hook_resid_pre",
        "sparsity_coeff-0.1_sae_positions-blocks.1.hook_resid_pre-blocks.2.hook_resid_pre",
        "sparsity_coeff-1.0_sae_positions-blocks.1.hook_resid_pre",
        "sparsity_coeff-1.0_sae_positions-blocks.1.hook_resid_pre-blocks.2.hook_resid_pre",
    ]
    loaded = e2e_fast.SAETransformer.from_local_path(whole[3].folder, lm=model)
    assert list(loaded.by_position) == POSITIONS[1:3]
    # Killed after the first two members had written their last checkpoint and before the others had.
    for run in whole[2:]:
        for path in run.folder.glob("*_32.safetensors"):
            path.unlink()
    assert checkpoint.resumable(*(run.folder for run in whole)) == 16
    resumed: Any = e2e_fast.train(settings(files, **changes), lm=model, resume=folder, quiet=True)
    for ours, theirs in zip(resumed, whole, strict=True):
        assert_equal(ours, theirs)
        assert ours.folder == theirs.folder
        rows = (ours.folder / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(row) for row in rows] == ours.history
    assert_equal(e2e_fast.train(whole[0].folder / "final_config.yaml", lm=model, quiet=True), whole[0])


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"sparsity": [0.1]}, "sweep.sparsity: unknown key"),
        ({"sparsity_coef": [0.1]}, "(did you mean sparsity_coeff?)"),
        ({"seed": [1, 1]}, "every value may stand once"),
        ({"seed": []}, "sweep.seed"),
        ({}, "at least one key"),
        ({"share_logits": True}, "at least one key"),
        ({"k": [0]}, "sweep.k.0: Input should be greater than 0; got 0"),
    ],
)
def test_a_mistake_in_a_sweep_is_named(files: Path, sweep: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        e2e_fast.load_config(settings(files, sweep=sweep))
    assert message in str(error.value)
