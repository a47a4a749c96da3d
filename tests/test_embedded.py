"""The embedded text and language model: what the text is, the loss that the weights reach, how they are made."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from e2e_fast import embedded, train_lm
from e2e_fast.data import DatasetConfig, TokenBatches
from e2e_fast.embedded import corpus
from e2e_fast.tokenizer import load_tokenizer

# ------------------------------------------------------------------------------------------------------------ the text


def test_splits_share_no_file_and_documents_come_in_a_fixed_order():
    train, heldout = ([name for name, _ in corpus.documents(split)] for split in corpus.SPLITS)
    assert set(train).isdisjoint(heldout)
    assert len(set(train)) > 10 * len(set(heldout)) > 50
    assert train == [name for name, _ in corpus.documents("train")]
    assert train.count(corpus.DOCUMENTATION) > 50  # one document a page


def test_text_is_large_and_free_of_tests_and_installed_packages():
    size = sum(len(text.encode()) for split in corpus.SPLITS for _, text in corpus.documents(split))
    assert 5e6 < size < 20e6
    for name in corpus.source_files():
        assert not {"test", "tests", "site-packages", "idlelib", "tkinter", "encodings"} & set(name.split("/"))
        assert name.endswith(".py")


def test_documents_are_the_files_of_this_python():
    texts = dict(corpus.documents("train"))
    assert texts["argparse.py"] == (corpus.standard_library() / "argparse.py").read_text(encoding="utf-8")
    assert embedded.text("heldout").count(embedded.SEPARATOR) == len(list(corpus.documents("heldout"))) - 1


def test_another_split_is_refused():
    with pytest.raises(ValueError, match="split must be one of 'train', 'heldout', got 'test'"):
        embedded.text("test")


def test_a_python_without_its_source_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(corpus, "standard_library", lambda: tmp_path)
    corpus.source_files.cache_clear()
    with pytest.raises(FileNotFoundError, match=f"none are under {tmp_path}"):
        next(corpus.documents("train"))
    corpus.source_files.cache_clear()


# ---------------------------------------------------------------------------------------------------------- the tokens


def test_tokens_are_windows_of_the_text_with_bos_before_each_document():
    tokens = embedded.tokens("heldout", n_ctx=64)
    assert tokens.dtype == torch.int64
    assert tokens.shape[1] == 64
    documents = [text for _, text in corpus.documents("heldout")]
    assert abs((tokens == 0).sum().item() - len(documents)) <= 1  # the last window may be dropped
    assert tokens[0, 0] == 0
    tokenizer = load_tokenizer("embedded")
    assert tokenizer.decode(tokens.flatten().tolist()).startswith(embedded.SEPARATOR + documents[0])


def test_a_few_samples_are_the_first_of_all_and_need_not_tokenise_everything():
    embedded._encoded.cache_clear()
    few = embedded.tokens("heldout", n_ctx=32, n_samples=5)
    assert few.shape == (5, 32)
    everything = embedded.tokens("heldout", n_ctx=32)
    assert torch.equal(everything[:5], few)
    embedded._encoded.cache_clear()
    assert len(embedded.ids("train", 1000)) < 400_000


def test_sizes_that_the_text_does_not_have_are_refused():
    with pytest.raises(ValueError, match=r"has \d+ tokens, 0 samples of n_ctx=10000000"):
        embedded.tokens("heldout", n_ctx=10_000_000)
    with pytest.raises(ValueError, match="n_samples asks for 1000000"):
        embedded.tokens("heldout", n_ctx=8, n_samples=1_000_000)
    with pytest.raises(ValueError, match="must be positive, got 0"):
        embedded.tokens("heldout", n_ctx=0)


def test_embedded_is_a_dataset():
    config = DatasetConfig(
        dataset_name="embedded", tokenizer_name="embedded", split="heldout[:50%]", n_ctx=128, shuffle=False
    )
    batches = TokenBatches(config, batch_size=4, vocab_size=2048, repeat=False)
    rows = torch.cat(list(batches))
    assert torch.equal(rows, embedded.tokens("heldout", 128)[: len(rows)])
    assert len(rows) == batches.n_windows
    assert batches.n_windows == round(len(embedded.tokens("heldout", 128)) / 2)
    again = TokenBatches(config, batch_size=4, tokenizer=load_tokenizer("embedded"), repeat=False)
    assert torch.equal(torch.cat(list(again)), rows)


# ----------------------------------------------------------------------------------------------------------- the model


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(embedded.path()).eval()


def test_weights_reach_the_recorded_heldout_loss(model: Any):
    record = embedded.record()
    rows = embedded.tokens("heldout", model.config.n_positions, record["sample_windows"]).numpy()
    loss = train_lm.heldout_loss(model, rows)
    same_text = corpus.fingerprint() == record["text_fingerprint"]
    assert loss == pytest.approx(record["sample_nats_per_token"], abs=1e-4 if same_text else 0.3)


def test_model_is_far_better_than_a_bigram_model():
    record = embedded.record()
    assert record["heldout_nats_per_token"] < record["bigram_nats_per_token"] - 0.5
    assert record["bigram_nats_per_token"] < record["unigram_nats_per_token"]


def test_weights_are_small_float16_files_that_load_as_float32(model: Any):
    from safetensors.torch import load_file

    folder = Path(embedded.path())
    stored = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert sum(file.stat().st_size for file in folder.iterdir() if file.suffix != ".py" and file.is_file()) < 4 * 2**20
    assert model.config.model_type == "gpt2"
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_the_readme_states_the_record():
    readme = (Path(embedded.path()) / "README.md").read_text()
    assert readme == train_lm.readme(embedded.record())
    assert "--seed 0" in readme


# --------------------------------------------------------------------------------------------------------- the training


def test_train_lm_learns_and_writes_a_folder_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from transformers import AutoModelForCausalLM

    def few(split: str) -> Any:
        names = ("json/decoder.py", "argparse.py", "enum.py") if split == "train" else ("json/encoder.py",)
        return ((name, (corpus.standard_library() / name).read_text()) for name in names)

    monkeypatch.setattr(corpus, "documents", few)
    small: Any = {"n_ctx": 32, "vocab_size": 384, "n_embd": 32, "n_layer": 1, "n_head": 2}
    train_lm.train_lm(tmp_path, steps=60, batch_size=16, lr=1e-2, autocast=False, **small)
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["heldout_nats_per_token"] < record["unigram_nats_per_token"]
    assert "--steps 60" in record["command"]
    assert record["command"] in (tmp_path / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    (_, text), *_ = few("heldout")
    ids = np.array([0, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]])
    rows = train_lm.windows(ids, 32)
    assert train_lm.heldout_loss(model, rows) == pytest.approx(record["heldout_nats_per_token"], abs=1e-4)


def test_training_stops_at_a_loss_that_is_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(corpus, "documents", lambda split: iter([("a.py", "a = 1\n" * 200)]))
    small: Any = {"n_ctx": 16, "vocab_size": 300, "n_embd": 8, "n_layer": 1, "n_head": 1}
    with pytest.raises(FloatingPointError, match=r"at step .* try a lower lr than 1e"):
        train_lm.train_lm(tmp_path / "lm", steps=20, batch_size=2, lr=1e30, autocast=False, **small)
    assert not (tmp_path / "lm").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"n_embd": 30, "n_head": 4}, "n_embd must be a multiple of n_head = 4, got 30"),
        ({"vocab_size": 100}, r"vocab_size must lie in \[257, 65536\].*got 100"),
    ],
)
def test_training_refuses_sizes_that_make_no_model(tmp_path: Path, arguments: Any, message: str):
    with pytest.raises(ValueError, match=message):
        train_lm.train_lm(tmp_path / "lm", **arguments)


def test_epochs_cut_the_text_anew_and_visit_all_of_it():
    ids = np.arange(103)
    batches = train_lm.random_batches(ids, length=10, batch_size=2, seed=0)
    epochs = [np.concatenate([next(batches) for _ in range(4)]) for _ in range(3)]
    for epoch in epochs:
        assert (np.diff(epoch, axis=1) == 1).all()
        assert len(np.unique(epoch)) == 80
    assert len({int(epoch[0, 0]) % 10 for epoch in epochs}) > 1


def test_ngram_losses_are_entropies_where_the_text_is_known():
    ids = np.tile([1, 2, 3, 1, 3], 2000)
    losses = train_lm.ngram_losses(ids, ids[:5000].reshape(-1, 50), vocab_size=4)
    assert losses["unigram"] == pytest.approx(-(0.8 * np.log(0.4) + 0.2 * np.log(0.2)), abs=0.01)
    # After 2 comes 3 and after 3 comes 1; only what follows 1 is uncertain, 2 or 3.
    assert losses["bigram"] == pytest.approx(0.4 * np.log(2), abs=0.01)


def test_importing_touches_neither_transformers_nor_datasets():
    code = (
        "import sys, e2e_fast.data, e2e_fast.embedded, e2e_fast.train_lm\n"
        "heavy = {'transformers', 'datasets', 'tokenizers', 'transformer_lens', 'wandb', 'matplotlib', 'triton'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
