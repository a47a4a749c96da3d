"""Token batches: every source, the order of batches, resuming, ranks, the prefetching thread, and refused input."""

import gc
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from e2e_fast.data import DatasetConfig, TokenBatches
from e2e_fast.tokenizer import load_tokenizer


def config(name: Any, **keys: Any) -> DatasetConfig:
    """A configuration for 8-token windows in file order, unless `keys` say otherwise."""
    defaults = {"tokenizer_name": "none", "split": "train", "n_ctx": 8, "shuffle": False}
    return DatasetConfig(dataset_name=str(name), **{**defaults, **keys})


def take(batches: TokenBatches, n: int) -> torch.Tensor:
    """The next n batches in one tensor."""
    iterator = iter(batches)
    out = torch.cat([next(iterator) for _ in range(n)])
    batches.close()
    return out


def all_rows(batches: TokenBatches) -> list[list[int]]:
    return [row for batch in batches for row in batch.tolist()]


@pytest.fixture
def rows() -> np.ndarray:
    """40 windows of 8 tokens, all ids different."""
    return np.arange(320).reshape(40, 8)


@pytest.fixture
def npy(rows: np.ndarray, tmp_path: Path) -> Path:
    np.save(tmp_path / "rows.npy", rows)
    return tmp_path / "rows.npy"


@pytest.fixture
def alphabet(tmp_path: Path) -> str:
    """A tokenizer folder: a to z, newline and space, one id a character."""
    folder = tmp_path / "alphabet"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz\n ")}))
    return str(folder)


# ------------------------------------------------------------------------------------------------------ configuration


def test_config_has_the_defaults_of_e2e_sae_and_refuses_other_keys():
    c = DatasetConfig(dataset_name="d", tokenizer_name="t", split="train", n_ctx=4)
    assert (c.is_tokenized, c.streaming, c.seed, c.column_name) == (True, True, None, "input_ids")
    with pytest.raises(ValidationError, match="splitt"):
        DatasetConfig.model_validate({**c.model_dump(), "splitt": "x"})
    with pytest.raises(ValidationError, match="frozen"):
        c.n_ctx = 3
    for missing in ("dataset_name", "tokenizer_name", "split", "n_ctx"):
        with pytest.raises(ValidationError, match=missing):
            DatasetConfig.model_validate({k: v for k, v in c.model_dump().items() if k != missing})


# ------------------------------------------------------------------------------------------------------------- arrays


def test_npy_rows_come_in_order_as_int64(npy: Path, rows: np.ndarray):
    batches = TokenBatches(config(npy), batch_size=4, repeat=False)
    assert all_rows(batches) == rows.tolist()
    batch = next(iter(batches))
    assert batch.dtype == torch.int64
    assert batch.shape == (4, 8)
    assert batches.n_windows == 40


@pytest.mark.parametrize("n_ctx", [1, 3, 4, 8])
def test_longer_rows_are_cut_into_windows(npy: Path, rows: np.ndarray, n_ctx: int):
    got = all_rows(TokenBatches(config(npy, n_ctx=n_ctx), batch_size=7, repeat=False))
    assert got == rows[:, : 8 // n_ctx * n_ctx].reshape(-1, n_ctx).tolist()


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_flat_ids_are_cut_into_windows_and_stay_on_disk(tmp_path: Path, dtype: Any):
    ids = np.arange(100, dtype=dtype)
    ids.tofile(tmp_path / "ids.bin")
    np.save(tmp_path / "ids.npy", ids)
    for name in ("ids.bin", "ids.npy"):
        batches = TokenBatches(config(tmp_path / name, token_dtype=dtype), batch_size=5, repeat=False)
        assert all_rows(batches) == ids[:96].reshape(12, 8).tolist()
        source: Any = batches._source
        assert not source.in_memory


def test_split_slices_select_disjoint_windows(npy: Path, rows: np.ndarray):
    train = all_rows(TokenBatches(config(npy, split="train[:75%]"), batch_size=4, repeat=False))
    held = all_rows(TokenBatches(config(npy, split="train[75%:]"), batch_size=4, repeat=False))
    assert train + held == rows.tolist()
    some = all_rows(TokenBatches(config(npy, split="train[3:5]"), batch_size=4, repeat=False))
    assert some == rows[3:5].tolist()
    with pytest.raises(ValueError, match=r"split .*must be train, .*got 'test'"):
        TokenBatches(config(npy, split="test"), batch_size=4)
    with pytest.raises(ValueError, match=r"split .* is empty"):
        TokenBatches(config(npy, split="train[40:]"), batch_size=4)


# --------------------------------------------------------------------------------------------------- the order of it


def test_each_epoch_is_another_permutation_fixed_by_the_seed(npy: Path, rows: np.ndarray):
    def epochs(seed: int) -> list[list[list[int]]]:
        out = take(TokenBatches(config(npy, shuffle=True), batch_size=10, seed=seed), 8).tolist()
        return [out[:40], out[40:]]

    first, second = epochs(0)
    assert sorted(first) == sorted(second) == rows.tolist()
    assert first != second
    assert first != rows.tolist()
    assert epochs(0) == [first, second]
    assert epochs(1)[0] != first


def test_the_config_seed_wins_over_the_runs(npy: Path):
    own = take(TokenBatches(config(npy, shuffle=True, seed=7), batch_size=4, seed=1), 3)
    assert torch.equal(own, take(TokenBatches(config(npy, shuffle=True), batch_size=4, seed=7), 3))


def test_batches_run_across_epochs_without_dropping_windows(npy: Path, rows: np.ndarray):
    got = take(TokenBatches(config(npy), batch_size=64), 2)
    assert torch.equal(got, torch.from_numpy(np.concatenate([rows] * 4)[:128]))


def test_ranks_together_see_what_one_process_sees(npy: Path):
    whole = take(TokenBatches(config(npy, shuffle=True), batch_size=6), 9).reshape(9, 6, 8)
    parts = [
        take(TokenBatches(config(npy, shuffle=True), batch_size=2, rank=rank, world_size=3), 9).reshape(9, 2, 8)
        for rank in range(3)
    ]
    assert torch.equal(torch.cat(parts, dim=1), whole)


def test_ranks_take_equally_many_batches_when_windows_run_out(npy: Path):
    counts = [sum(1 for _ in TokenBatches(config(npy), 3, rank=rank, world_size=4, repeat=False)) for rank in range(4)]
    assert counts == [3, 3, 3, 3]  # 40 windows hold three global batches of 12


def test_given_tokens_come_as_they_are_and_end(rows: np.ndarray):
    for tokens in (rows, torch.from_numpy(rows), torch.from_numpy(rows.astype(np.int32)), rows.tolist()):
        sizes = [len(batch) for batch in TokenBatches(None, batch_size=16, tokens=tokens)]
        assert sizes == [16, 16, 8]
        assert all_rows(TokenBatches(None, batch_size=16, tokens=tokens)) == rows.tolist()
    assert len(take(TokenBatches(None, batch_size=16, tokens=rows, repeat=True), 5)) == 80
    shuffled = all_rows(TokenBatches(None, batch_size=16, tokens=rows, shuffle=True))
    assert shuffled != rows.tolist()
    assert sorted(shuffled) == rows.tolist()


def test_given_tokens_replace_what_the_config_names(rows: np.ndarray):
    batches = TokenBatches(config("no/such/dataset"), batch_size=4, tokens=rows)
    assert all_rows(batches) == rows.tolist()
    assert batches.n_ctx == 8


# ------------------------------------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize("consumed", [0, 1, 3, 10, 13, 27])
def test_a_resumed_run_continues_with_exactly_the_next_batch(npy: Path, consumed: int):
    straight = take(TokenBatches(config(npy, shuffle=True), batch_size=6, prefetch=3), consumed + 8)
    first = TokenBatches(config(npy, shuffle=True), batch_size=6, prefetch=3)
    iterator = iter(first)
    for _ in range(consumed):
        next(iterator)
    state = json.loads(json.dumps(first.state_dict()))  # as a checkpoint would keep it
    second = TokenBatches(config(npy, shuffle=True), batch_size=6, prefetch=3)
    second.load_state_dict(state)
    assert torch.equal(take(second, 8), straight[consumed * 6 :])
    first.close()


def test_breaking_off_loses_nothing(npy: Path, rows: np.ndarray):
    batches = TokenBatches(config(npy), batch_size=4, prefetch=8, repeat=False)
    got = []
    for batch in batches:
        got += batch.tolist()
        if len(got) == 12:
            break
    assert got + all_rows(batches) == rows.tolist()


def test_iterating_again_after_the_end_starts_the_next_epoch(rows: np.ndarray):
    batches = TokenBatches(None, batch_size=16, tokens=rows)
    assert all_rows(batches) == all_rows(batches) == rows.tolist()
    assert batches.state_dict() == {"seed": 0, "epoch": 2, "index": 0}


def test_a_state_of_another_seed_or_shape_is_refused(npy: Path):
    batches = TokenBatches(config(npy), batch_size=4, seed=3)
    with pytest.raises(ValueError, match="saved with seed 4, this run has seed 3"):
        batches.load_state_dict({"seed": 4, "epoch": 0, "index": 0})
    with pytest.raises(ValueError, match="keys seed, epoch and index"):
        batches.load_state_dict({"step": 4})


# ------------------------------------------------------------------------------------------------------------- threads


def data_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "e2e_fast data"]


def test_batches_are_made_off_the_consumers_thread_and_no_further_ahead_than_asked(npy: Path):
    batches = TokenBatches(config(npy), batch_size=1, prefetch=2)
    made: list[str] = []
    source: Any = batches._source
    stack = source.stack

    def counting(items: list[int]) -> np.ndarray:
        made.append(threading.current_thread().name)
        return stack(items)

    source.stack = counting
    iterator = iter(batches)
    next(iterator)
    for _ in range(20):
        if len(made) >= 4:
            break
        data_threads()[0].join(0.05)
    data_threads()[0].join(0.2)
    assert len(made) <= 4  # one consumed, two waiting, one in hand
    assert set(made) == {"e2e_fast data"}
    batches.close()


def test_no_thread_is_left_behind(npy: Path):
    batches = TokenBatches(config(npy), batch_size=4, prefetch=1)
    iterator = iter(batches)
    next(iterator)
    assert len(data_threads()) == 1
    batches.close()
    assert data_threads() == []

    with batches:
        kept = iter(batches)
        next(kept)
    assert data_threads() == []

    next(iter(batches))  # dropped at once
    gc.collect()
    assert data_threads() == []

    one, two = iter(batches), iter(batches)
    next(two)
    assert len(data_threads()) == 1
    with pytest.raises(StopIteration):  # a new iteration ends the older one
        next(one)
    batches.close()
    assert data_threads() == []


def test_an_error_while_reading_is_raised_in_the_loop(tmp_path: Path):
    ids = np.arange(80, dtype=np.uint16)
    ids[50] = 999
    ids.tofile(tmp_path / "ids.bin")
    iterator = iter(TokenBatches(config(tmp_path / "ids.bin"), batch_size=2, vocab_size=100))
    good = [next(iterator) for _ in range(3)]
    assert torch.cat(good).max() == 47
    with pytest.raises(ValueError, match=r"token ids in .*ids.bin must lie in \[0, 100\).*got 999"):
        next(iterator)
    assert data_threads() == []


# ---------------------------------------------------------------------------------------------------------------- text


def test_text_is_split_into_documents_and_cut(tmp_path: Path, alphabet: str):
    (tmp_path / "t.txt").write_text("abcd\n<|endoftext|>\nefgh\n<|endoftext|>\n\n<|endoftext|>ij\nkl\n")
    whole = "abcdefghij\nkl"
    batches = TokenBatches(config(tmp_path / "t.txt", tokenizer_name=alphabet, n_ctx=4), 8, repeat=False)
    ids = ["abcdefghijklmnopqrstuvwxyz\n ".index(c) for c in whole]
    assert all_rows(batches) == [ids[0:4], ids[4:8], ids[8:12]]
    joined = config(tmp_path / "t.txt", tokenizer_name=alphabet, n_ctx=4, separator="ij", split="train[:1]")
    with pytest.raises(ValueError, match=r"characters are not in the vocabulary, among them '<>|'"):
        TokenBatches(joined, 8)


def test_characters_outside_the_vocabulary_are_named(tmp_path: Path, alphabet: str):
    (tmp_path / "t.txt").write_text("hello World!")
    with pytest.raises(ValueError, match=r"tokenise .*t\.txt: 2 characters .* among them '!W'"):
        TokenBatches(config(tmp_path / "t.txt", tokenizer_name=alphabet), 2)


@pytest.mark.shared
@pytest.mark.parametrize("add_bos", ["auto", "document", "window", "none"])
def test_bos_stands_where_it_was_asked_for(tmp_path: Path, shared: Path, add_bos: Any):
    (tmp_path / "t.txt").write_text("Hello world.\n<|endoftext|>\nOne day.\n<|endoftext|>\n" * 20)
    name = str(shared / "models" / "stories260K")
    tokenizer = load_tokenizer(name)
    documents = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("Hello world.", "One day.")] * 20
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    got = all_rows(TokenBatches(config(tmp_path / "t.txt", tokenizer_name=name, add_bos=add_bos), 8, repeat=False))
    if add_bos == "window":
        assert all(row[0] == bos for row in got)
        flat, width = [i for row in documents for i in (*row, eos)][:-1], 7
    else:
        before = [] if add_bos == "none" else [bos]
        flat, width = [i for row in documents for i in (*before, *row)], 8
    assert [row[-width:] for row in got] == [flat[i : i + width] for i in range(0, len(flat) - width + 1, width)]


@pytest.mark.shared
def test_real_text_with_the_gpt2_vocabulary(shared: Path):
    name = str(shared / "tokenizers")
    keys = {"tokenizer_name": name, "is_tokenized": False, "n_ctx": 32, "shuffle": True, "split": "train[:64]"}
    got = take(TokenBatches(config(shared / "text" / "tinystories.txt", **keys), 16, vocab_size=50257), 4)
    assert got.shape == (64, 32)
    tokenizer = load_tokenizer(name)
    windows = [tokenizer.decode(row) for row in got.tolist()]
    text = (shared / "text" / "tinystories.txt").read_text()
    assert sum(window.startswith("<|endoftext|>One day, a little girl named Lily") for window in windows) == 1
    assert all(part in text for window in windows for part in window.split("<|endoftext|>"))


@pytest.mark.shared
def test_text_gives_the_ids_that_the_model_was_trained_on(shared: Path):
    name = str(shared / "models" / "tiny-gpt2")
    text = (shared / "models" / "tiny-gpt2" / "corpus.txt").read_text()
    vocabulary = json.loads((shared / "models" / "tiny-gpt2" / "vocab.json").read_text())
    corpus = config(shared / "models" / "tiny-gpt2" / "corpus.txt", tokenizer_name=name, n_ctx=128)
    got = [i for row in all_rows(TokenBatches(corpus, 5, vocab_size=54, repeat=False)) for i in row]
    assert got == [vocabulary[c] for c in text.strip("\n")][: len(got)]
    assert len(text) - len(got) < 129


# ---------------------------------------------------------------------------------------------------------- tokenizers


@pytest.mark.shared
@pytest.mark.parametrize(
    ("folder", "bos", "vocabulary"),
    [("models/stories260K", 1, 512), ("models/babyllama-char", 1, 105), ("tokenizers", 50256, 50257)],
)
def test_load_tokenizer_reads_each_kind_of_folder(shared: Path, folder: str, bos: int, vocabulary: int):
    tokenizer = load_tokenizer(str(shared / folder))
    assert tokenizer.bos_token_id == bos
    assert len(tokenizer) == vocabulary
    text = "Once upon a time, there was a cat."
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]).strip() == text


def test_load_tokenizer_of_characters(alphabet: str):
    tokenizer = load_tokenizer(alphabet)
    assert tokenizer("a b\nc")["input_ids"] == [0, 27, 1, 26, 2]
    assert tokenizer.decode([0, 27, 1, 26, 2]) == "a b\nc"
    assert tokenizer.bos_token_id is None


def test_load_tokenizer_of_a_bare_tokenizer_json_knows_its_special_tokens(tmp_path: Path):
    import shutil

    from e2e_fast import embedded

    shutil.copy(Path(embedded.path()) / "tokenizer.json", tmp_path)
    assert load_tokenizer(str(tmp_path)).bos_token_id == load_tokenizer("embedded").bos_token_id == 0


def test_load_tokenizer_says_what_is_missing(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer_name: .* has no tokenizer\.json"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="tokenizer_name: there is no folder"):
        load_tokenizer(str(tmp_path / "nothing"))
    (tmp_path / "vocab.json").write_text('{"ab": 0}')
    with pytest.raises(ValueError, match="must map single characters to ids"):
        load_tokenizer(str(tmp_path))


# ----------------------------------------------------------------------------------------------- Hugging Face datasets


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets as files: ids.parquet (40 rows of 8 ids, in two columns) and documents.jsonl (30 texts)."""
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path_factory.mktemp("datasets")
    ids = np.arange(320).reshape(40, 8)
    table = pyarrow.table({"input_ids": ids.tolist(), "half": ids[:, :4].tolist(), "ratio": [0.5] * 40})
    pyarrow.parquet.write_table(table, folder / "ids.parquet")
    lines = [json.dumps({"text": f"document {i} says {i * i} times hello", "n": i}) for i in range(30)]
    (folder / "documents.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(autouse=True)
def _datasets_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.05)  # 5 s by default, a closed stream


@pytest.mark.parametrize("streaming", [True, False])
def test_tokenised_datasets(hub_folder: Path, rows: np.ndarray, streaming: bool):
    source = hub_folder / "ids.parquet"
    assert all_rows(TokenBatches(config(source, streaming=streaming), 16, repeat=False)) == rows.tolist()
    short = config(source, streaming=streaming, n_ctx=2, column_name="half")
    assert all_rows(TokenBatches(short, 16, repeat=False)) == rows[:, :4].reshape(-1, 2).tolist()
    shuffled = config(source, streaming=streaming, shuffle=True)
    two = take(TokenBatches(shuffled, 10), 8).tolist()
    assert sorted(two[:40]) == sorted(two[40:]) == rows.tolist()
    assert two[:40] != two[40:]
    assert two[:40] != rows.tolist()


@pytest.mark.parametrize("streaming", [True, False])
def test_the_first_epoch_has_the_order_of_e2e_sae(hub_folder: Path, streaming: bool):
    from datasets import load_dataset

    path = str(hub_folder / "ids.parquet")
    theirs: Any = load_dataset("parquet", data_files=path, split="train", streaming=streaming)
    theirs = theirs.shuffle(seed=5, buffer_size=1000) if streaming else theirs.shuffle(seed=5)
    ours = all_rows(TokenBatches(config(path, streaming=streaming, shuffle=True), 16, seed=5, repeat=False))
    assert ours == [row["input_ids"] for row in theirs]


@pytest.mark.parametrize("streaming", [True, False])
def test_untokenised_datasets_match_tokenize_and_concatenate(hub_folder: Path, streaming: bool):
    from datasets import load_dataset
    from transformer_lens.utilities import tokenize_and_concatenate

    path = str(hub_folder / "documents.jsonl")
    dataset: Any = load_dataset("json", data_files=path, split="train")
    theirs: Any = tokenize_and_concatenate(dataset, load_tokenizer("embedded"), max_length=8, num_proc=None)
    keys = {"tokenizer_name": "embedded", "is_tokenized": False, "streaming": streaming}
    ours = all_rows(TokenBatches(config(path, **keys), 16, repeat=False))
    assert ours == [row["tokens"].tolist() for row in theirs]
    documents = all_rows(TokenBatches(config(path, **keys, add_bos="document"), 16, repeat=False))
    assert sum(row.count(0) for row in documents) == 30


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("tokenised", [True, False])
@pytest.mark.parametrize("consumed", [1, 9])
def test_datasets_resume_with_exactly_the_next_batch(hub_folder: Path, streaming: bool, tokenised: bool, consumed: int):
    name = "ids.parquet" if tokenised else "documents.jsonl"
    keys = {"tokenizer_name": "embedded", "shuffle": True, "shuffle_buffer": 7}
    source = config(hub_folder / name, is_tokenized=tokenised, streaming=streaming, **keys)
    straight = take(TokenBatches(source, 6), consumed + 6)
    first, second = TokenBatches(source, 6), TokenBatches(source, 6)
    take(first, consumed)
    second.load_state_dict(first.state_dict())
    assert torch.equal(take(second, 6), straight[consumed * 6 :])


def test_ranks_share_a_dataset_and_a_short_row_is_raised_in_the_loop(hub_folder: Path, tmp_path: Path):
    source = config(hub_folder / "documents.jsonl", tokenizer_name="embedded", is_tokenized=False, shuffle=True)
    whole = take(TokenBatches(source, 4), 10).reshape(10, 4, 8)
    parts = [take(TokenBatches(source, 2, rank=rank, world_size=2), 10).reshape(10, 2, 8) for rank in range(2)]
    assert torch.equal(torch.cat(parts, dim=1), whole)

    rows = [{"input_ids": list(range(n))} for n in (8, 8, 8, 5)]
    (tmp_path / "short.jsonl").write_text("\n".join(map(json.dumps, rows)))
    iterator = iter(TokenBatches(config(tmp_path / "short.jsonl"), 2))
    assert next(iterator).tolist() == [list(range(8))] * 2
    with pytest.raises(ValueError, match=r"n_ctx must be at most 5, the length of a row of dataset .*short\.jsonl"):
        next(iterator)


def test_a_folder_of_files_is_a_dataset(hub_folder: Path, tmp_path: Path, rows: np.ndarray):
    import shutil

    shutil.copy(hub_folder / "ids.parquet", tmp_path / "train.parquet")
    assert all_rows(TokenBatches(config(tmp_path), 16, repeat=False)) == rows.tolist()


# ------------------------------------------------------------------------------------------------------- refused input


def test_datasets_of_the_wrong_kind_are_refused(hub_folder: Path, tmp_path: Path):
    ids, documents = hub_folder / "ids.parquet", hub_folder / "documents.jsonl"
    with pytest.raises(ValueError, match="no column 'tokens', its columns are half, input_ids, ratio"):
        TokenBatches(config(ids, column_name="tokens"), 2)
    with pytest.raises(ValueError, match="no column 'text', its columns are half, input_ids, ratio"):
        TokenBatches(config(ids, is_tokenized=False, tokenizer_name="embedded"), 2)
    with pytest.raises(ValueError, match="must hold text when is_tokenized is false, got int"):
        TokenBatches(config(documents, is_tokenized=False, column_name="n", tokenizer_name="embedded"), 2)
    with pytest.raises(ValueError, match="must hold lists of token ids when is_tokenized is true, got str"):
        TokenBatches(config(documents, column_name="text"), 2)
    with pytest.raises(ValueError, match="must hold lists of token ids when is_tokenized is true, got float"):
        TokenBatches(config(ids, column_name="ratio"), 2)
    with pytest.raises(ValueError, match="n_ctx must be at most 8, the length of a row"):
        TokenBatches(config(ids, n_ctx=9), 2)
    with pytest.raises(ValueError, match="split 'test'"):
        TokenBatches(config(ids, split="test"), 2)
    with pytest.raises(ValueError, match="holds no window of 100000 tokens"):
        next(iter(TokenBatches(config(documents, is_tokenized=False, tokenizer_name="embedded", n_ctx=100_000), 2)))
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        TokenBatches(config(tmp_path / "missing.parquet"), 2)


def test_missing_files_and_datasets_are_named(tmp_path: Path):
    for name in ("missing.txt", "missing.npy", "data/missing.bin", "./missing", str(tmp_path / "missing")):
        with pytest.raises(FileNotFoundError, match=rf"no file or folder .*{Path(name).name}"):
            TokenBatches(config(name), 2)
    with pytest.raises((FileNotFoundError, ConnectionError), match=r"dataset_name: .*no-one/no-such-dataset"):
        TokenBatches(config("no-one/no-such-dataset"), 2)


def test_text_files_that_hold_nothing_usable_are_refused(tmp_path: Path, alphabet: str):
    for name, content, message in [
        ("empty.txt", b"", "is empty"),
        ("blank.txt", b"\n\n<|endoftext|>\n", "holds no text"),
        ("latin.txt", "caf\xe9".encode("latin-1"), "is no UTF-8 text"),
        ("short.txt", b"abcdefg", "n_ctx must be at most 7, the tokens in .*short.txt, got 8"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            TokenBatches(config(tmp_path / name, tokenizer_name=alphabet), 2)


def test_arrays_that_hold_no_token_ids_are_refused(tmp_path: Path):
    for name, array, message in [
        ("deep", np.zeros((2, 3, 8), dtype=np.int64), r"must be \[samples, T\] or \[tokens\], got shape \[2, 3, 8\]"),
        ("scalar", np.zeros((), dtype=np.int64), "must be .* got shape"),
        ("floats", np.zeros((2, 8)), "must hold integer token ids, got float64"),
        ("short", np.zeros((2, 7), dtype=np.int64), "n_ctx must be at most 7"),
        ("none", np.zeros((0, 8), dtype=np.int64), "n_ctx must be at most"),
    ]:
        np.save(tmp_path / f"{name}.npy", array)
        with pytest.raises(ValueError, match=message):
            TokenBatches(config(tmp_path / f"{name}.npy"), 2)
    (tmp_path / "text.npy").write_text("not an array")
    with pytest.raises(ValueError, match="no readable array"):
        TokenBatches(config(tmp_path / "text.npy"), 2)
    (tmp_path / "odd.bin").write_bytes(b"abc")
    with pytest.raises(ValueError, match=r"token_dtype: .* 3 bytes, no whole number of uint16"):
        TokenBatches(config(tmp_path / "odd.bin"), 2)


def test_ids_outside_the_vocabulary_are_refused(npy: Path, rows: np.ndarray):
    with pytest.raises(ValueError, match=r"token ids in tokens must lie in \[0, 319\), the vocabulary, got 319"):
        TokenBatches(None, 2, tokens=rows, vocab_size=319)
    with pytest.raises(ValueError, match="got -1"):
        TokenBatches(None, 2, tokens=rows - 1)
    assert len(take(TokenBatches(config(npy), 2, vocab_size=320), 20)) == 40


def test_arguments_out_of_range_are_named(rows: np.ndarray):
    for keys, message in [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 2, "rank": 2, "world_size": 2}, r"rank must lie in \[0, 2\), got 2"),
        ({"batch_size": 2, "prefetch": 0}, "prefetch must be at least 1"),
        ({"batch_size": 2, "tokens": rows[0]}, r"tokens must be \[samples, T\], got shape \[8\]"),
        ({"batch_size": 2, "tokens": rows[:0]}, "at least one sample"),
        ({"batch_size": 2, "tokens": rows * 1.0}, "tokens must hold integer token ids, got float64"),
    ]:
        with pytest.raises(ValueError, match=message):
            TokenBatches(None, **{"tokens": rows, **keys})
    with pytest.raises(ValueError, match="a config or tokens"):
        TokenBatches(None, 2)
