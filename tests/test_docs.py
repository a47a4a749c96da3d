"""What the pages say exists: links, commands and their options, source files; and their Python examples run."""

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer

import e2e_fast
from e2e_fast import embedded, formats
from e2e_fast.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)
POSITION = "blocks.6.hook_resid_pre"

CONFIG = f"""
tlens_model_name: gpt2
n_samples: 16
save_every_n_samples: null
eval_n_samples: null
batch_size: 4
lr: 5e-4
act_frequency_n_tokens: 500
loss:
  sparsity: {{coeff: 1.5}}
  in_to_orig: null
  out_to_orig: null
  out_to_in: null
  logits_kl: {{coeff: 1.0}}
train_data: {{dataset_name: tokens.npy, tokenizer_name: gpt2, split: train, n_ctx: 16}}
saes: {{sae_positions: {POSITION}, dict_size_to_input_ratio: 4}}
"""


def page_names(page: Path) -> str:
    return page.name


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=page_names)
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def options(words: list[str]) -> tuple[set[str], set[str]]:
    """The options among the words of an e2e-fast command line, and those that the command has."""
    command: Any = typer.main.get_command(app)
    while words and hasattr(command, "commands"):
        assert words[0] in command.commands, f"e2e-fast has no command {words[0]}"
        command = command.commands[words.pop(0)]
    return {word for word in words if word.startswith("--")}, {option for p in command.params for option in p.opts}


@pytest.mark.parametrize("page", PAGES, ids=page_names)
def test_commands_have_the_options_that_pages_give_them(page: Path) -> None:
    text = page.read_text()
    fenced = re.findall(r"^ *e2e-fast (\S.*)$", "\n".join(re.findall(r"```\n(.*?)```", text, re.DOTALL)), re.MULTILINE)
    quoted = re.findall(r"`e2e-fast (\w[^`|]+)`", text)
    for line in [*fenced, *(" ".join(words.split()) for words in quoted)]:
        words = [word.strip("[]") for word in shlex.split(line, comments=True)]
        given, known = options(words)
        assert given <= known, f"e2e-fast {line}"


def test_the_tree_in_the_design_is_the_tree() -> None:
    page = (ROOT / "docs" / "design.md").read_text()
    tree = page.split("```")[1]
    parts = re.split(r"^(\w+)/", tree, flags=re.MULTILINE)
    named = {
        folder: set(re.findall(r"(\w+)(?=\.(?:py|\*|inl|hpp|cpp))", part))
        for folder, part in zip(parts[1::2], parts[2::2], strict=True)
    }
    for folder in ("e2e_fast", "kernels", "csrc"):
        files = {file.stem for file in (ROOT / folder).iterdir() if file.suffix in (".py", ".cpp", ".hpp", ".inl")}
        hidden = {name for name in files if name.startswith("_")}
        assert named[folder] - {"__init__"} == files - hidden, folder


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the examples name: a small model called gpt2, a configuration, runs and files of SAEs."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("workshop")
    torch.manual_seed(0)
    size: Any = {"n_layer": 12, "n_embd": 16, "n_head": 2, "vocab_size": 2048, "n_positions": 128}
    GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0)).save_pretrained(folder / "gpt2")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(embedded.path()) / name, folder / "gpt2")
    (folder / "gpt2_e2e.yaml").write_text(CONFIG)
    return folder


EXAMPLES = [
    pytest.param(page, i, id=f"{page.name}-{i}")
    for page in PAGES
    if page.name != "design.md"  # lists of signatures
    for i in range(len(blocks(page, "python")))
]


@pytest.mark.parametrize(("page", "number"), EXAMPLES)
def test_python_examples_run(
    page: Path, number: int, workshop: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workshop)
    tokens = torch.randint(2048, (32, 16), generator=torch.Generator().manual_seed(0))
    lm = e2e_fast.load_lm("gpt2")
    if not Path("out").exists():
        for name in ("local_seed0", "run_a"):
            run = e2e_fast.train("gpt2_e2e.yaml", lm, tokens, quiet=True)
            assert run.folder is not None
            run.folder.rename(Path("out") / name)
        formats.write(formats.read("out/run_a"), "gpt2_layer6", "sae_lens")
        formats.write(formats.read("out/run_a"), "other", "dictionary_learning")
        np.save("tokens.npy", tokens.numpy())
    model = e2e_fast.SAETransformer.from_local_path("out/local_seed0")
    one = model.saes[POSITION.replace(".", "-")]
    names = {
        "e2e_fast": e2e_fast, "lm": lm, "tokens": tokens, "model": model, "sae": lambda x: one(x).output,
        "sparsity": 0.0, "x": torch.randn(3, 16), "A": torch.randn(40, 8), "B": torch.randn(40, 8),
        "W_dec": torch.randn(64, 16), "W_dec_of_b": torch.randn(64, 16),
    }  # fmt: skip
    example = blocks(page, "python")[number].replace("        ...\n", "        break\n").replace("20_000", "16")
    exec(compile(example, f"{page.name}, example {number}", "exec"), names)
