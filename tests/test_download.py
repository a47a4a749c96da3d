"""Runs on Weights & Biases and the Hugging Face hub: what is fetched, and what is said where something is missing."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from tiny import settings

import e2e_fast
from e2e_fast import DownloadError, MissingPackage, checkpoint, cli
from e2e_fast.optional import require
from e2e_fast.sae import to_e2e_sae


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.gpt2()


@pytest.fixture(scope="module")
def run(model: Any, tmp_path_factory: pytest.TempPathFactory) -> e2e_fast.Run:
    folder = tmp_path_factory.mktemp("runs")
    return e2e_fast.train(settings(folder, save_every_n_samples=24), model, tiny.tokens(), quiet=True)


def serve(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[str]:
    """Puts ``folder`` behind stand-ins of both clients; returns the names of the files that are fetched."""
    fetched: list[str] = []

    def copy(name: str, root: str) -> str:
        fetched.append(name)
        Path(root).mkdir(parents=True, exist_ok=True)
        return str(shutil.copy(folder / name, root))

    def file(name: str) -> Any:
        return SimpleNamespace(name=name, download=lambda root, exist_ok: copy(name, root))

    names = [path.name for path in folder.iterdir()]
    wandb_run = SimpleNamespace(files=lambda: [file(name) for name in names], file=file)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Api=lambda: SimpleNamespace(run=lambda path: wandb_run)))
    api = SimpleNamespace(list_repo_files=lambda repo: [*names, *(f"sub/{name}" for name in names)])
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
    cache = folder.parent / "hub"
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda repo, name: copy(name.removeprefix("sub/"), str(cache / repo))
    )
    return fetched


@pytest.mark.parametrize("source", ["wandb", "hub", "a folder on the hub"])
def test_the_configuration_and_the_newest_weights_are_fetched(
    source: str, model: Any, run: e2e_fast.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run.folder is not None
    fetched = serve(monkeypatch, run.folder)
    if source == "wandb":
        loaded = e2e_fast.SAETransformer.from_wandb("me/gpt2/abc", lm=model, cache_dir=tmp_path)
        assert (tmp_path / "me_gpt2_abc" / checkpoint.CONFIG).is_file()
    else:
        subfolder = None if source == "hub" else "sub"
        loaded = e2e_fast.SAETransformer.from_hub("me/saes", lm=model, subfolder=subfolder)
    assert fetched == [checkpoint.CONFIG, "samples_48.safetensors", checkpoint.SUMMARY]
    expected = to_e2e_sae(run.model.by_position)
    for key, value in to_e2e_sae(loaded.by_position).items():
        assert torch.equal(value, expected[key])


def test_a_place_without_saes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notes.md").write_text("nothing here")
    serve(monkeypatch, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"me/gpt2/abc holds no final_config.yaml .*it has \['notes.md'\]"):
        e2e_fast.SAETransformer.from_wandb("me/gpt2/abc", cache_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match="me/saes/sub holds no final_config.yaml"):
        e2e_fast.SAETransformer.from_hub("me/saes", subfolder="sub")
    with pytest.raises(ValueError, match="a wandb run is entity/project/run_id, got 'abc'"):
        e2e_fast.SAETransformer.from_wandb("abc")


def test_without_network_or_login_the_error_names_the_run_and_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unreachable(Exception):
        """What a client raises: neither OSError nor ValueError."""

    def fail(*_: Any) -> Any:
        raise Unreachable("Name or service not known\nmore lines")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Api=fail))
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: SimpleNamespace(list_repo_files=fail))
    why = r"\(Name or service not known\): check its name, the network and, where it is private, "
    with pytest.raises(DownloadError, match=f"cannot fetch the wandb run me/gpt2/abc {why}`wandb login`"):
        e2e_fast.SAETransformer.from_wandb("me/gpt2/abc")
    with pytest.raises(DownloadError, match=f"cannot fetch me/saes on the Hugging Face hub {why}`hf auth login`"):
        e2e_fast.SAETransformer.from_hub("me/saes")


def test_a_missing_package_is_named_with_what_installs_it(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("wandb", "datasets", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        MissingPackage, match=r"wandb run a/b/c needs the package wandb: pip install 'e2e-fast\[wandb\]'"
    ):
        e2e_fast.SAETransformer.from_wandb("a/b/c")
    with pytest.raises(MissingPackage, match=r"logging to wandb_project 'p' needs the package wandb: pip install"):
        e2e_fast.train(settings(wandb_project="p"), model, tiny.tokens(), quiet=True)
    data = {"dataset_name": "some/dataset", "tokenizer_name": "gpt2", "split": "train", "n_ctx": 16}
    with pytest.raises(MissingPackage, match=r"dataset_name 'some/dataset' needs .*'e2e-fast\[data\]'"):
        e2e_fast.train(settings(train_data=data), model, quiet=True)

    np.save(tmp_path / "a.npy", np.eye(4, dtype=np.float32))
    file = str(tmp_path / "a.npy")
    monkeypatch.setattr("sys.argv", ["e2e-fast", "match", file, file, "--json", "--pairs", str(tmp_path / "p.parquet")])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == cli.EXIT_BAD_INPUT
    assert "needs the package pyarrow: pip install pyarrow" in capsys.readouterr().err


def test_a_package_that_is_there_but_broken_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_package.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency") as error:
        require("broken_package", "testing")
    assert not isinstance(error.value, MissingPackage)
