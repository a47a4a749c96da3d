"""Runs that lie on Weights & Biases or on the Hugging Face hub: configuration and newest weights, into a local folder.

What `SAETransformer.from_wandb` and `from_hub` read. Nothing else of the package needs a network.

>>> wandb_run("sparsify/gpt2/1jy3m5j0")                                        # doctest: +SKIP
PosixPath('/home/me/.cache/e2e_fast/sparsify_gpt2_1jy3m5j0')
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from e2e_fast.checkpoint import CONFIG, SUMMARY, WEIGHTS
from e2e_fast.optional import require


class DownloadError(OSError):
    """A run that could not be fetched; the message says which, why, and what may help."""


def wandb_run(run: str, cache_dir: str | Path | None = None) -> Path:
    """The folder of a run ``entity/project/run_id`` of Weights & Biases (``cache_dir`` or ~/.cache/e2e_fast).

    Raises MissingPackage without wandb, ValueError for another kind of name, DownloadError when the run cannot be
    reached, and FileNotFoundError when it holds no SAEs.
    """
    if len([part for part in run.split("/") if part]) != 3:
        raise ValueError(f"a wandb run is entity/project/run_id, got {run!r}")
    wandb = require("wandb", f"downloading the wandb run {run}", extra="wandb")
    folder = Path(cache_dir or Path.home() / ".cache" / "e2e_fast") / run.strip("/").replace("/", "_")
    with _reaching(f"the wandb run {run}", "wandb login"):
        api = wandb.Api().run(run)
        names = [file.name for file in api.files()]
    for name in _wanted(names, run):
        with _reaching(f"{name} of the wandb run {run}", "wandb login"):
            api.file(name).download(root=str(folder), exist_ok=True)
    return folder


def hub_run(repo: str, subfolder: str | None = None) -> Path:
    """The folder of a run stored on the Hugging Face hub, in its cache.

    Raises DownloadError when it cannot be reached and FileNotFoundError when it holds no SAEs.
    """
    from huggingface_hub import HfApi, hf_hub_download

    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    with _reaching(f"{repo} on the Hugging Face hub", "hf auth login"):
        names = [n.removeprefix(prefix) for n in HfApi().list_repo_files(repo) if n.startswith(prefix)]
    paths = []
    for name in _wanted(names, f"{repo}/{prefix}".rstrip("/")):
        with _reaching(f"{name} of {repo} on the Hugging Face hub", "hf auth login"):
            paths.append(Path(hf_hub_download(repo, prefix + name)))
    return paths[0].parent


@contextmanager
def _reaching(what: str, login: str) -> Iterator[None]:
    """Errors of the client libraries, which share no base class, become one of ours."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DownloadError(
            f"cannot fetch {what} ({reason}): check its name, the network and, where it is private, `{login}`"
        ) from error


def _wanted(names: Sequence[str], run: str) -> list[str]:
    """The configuration, the newest weights and, where there is one, the summary among a run's files."""
    weights = [(int(m[1]), name) for name in names if (m := WEIGHTS.fullmatch(name))]
    if CONFIG not in names or not weights:
        raise FileNotFoundError(f"{run} holds no {CONFIG} with samples_N weights; it has {sorted(names)[:10]}")
    return [CONFIG, max(weights)[1], *(name for name in names if name == SUMMARY)]
