"""From a name or folder to a Hugging Face model and its tokenizer, and the configurations that its front runs with.

>>> source_of("gpt2-small"), source_of("pythia-70m")
('gpt2', 'EleutherAI/pythia-70m')
>>> source_of("./nope")
Traceback (most recent call last):
FileNotFoundError: model must be a name or a folder with a saved model; there is no folder ./nope
"""

import copy
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from e2e_fast import embedded

ALIASES = {
    "gpt2-small": "gpt2",
    "tiny-stories-1M": "roneneldan/TinyStories-1M",
    "tiny-stories-33M": "roneneldan/TinyStories-33M",
}
"""TransformerLens' short names, which configurations use; ``pythia-…`` stands for ``EleutherAI/pythia-…``."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "merges.txt")
"""A folder with none of these holds no tokenizer."""


class FrontConfigs(NamedTuple):
    """Configurations of the front alone: neither looks at the tokens, which would wait for a GPU in every step."""

    masks: Any
    """Without a padding token: transformers searches the batch for it, to warn."""
    no_masks: Any
    """Of an attention that needs no masks, for shapes whose masks are there already: transformers inspects position
    ids when it makes them."""


def front_configs(config: Any) -> FrontConfigs:
    masks = copy.copy(config)
    masks.pad_token_id = None
    no_masks = copy.copy(masks)
    no_masks._attn_implementation = "none_needed"
    return FrontConfigs(masks, no_masks)


def source_of(model: str | os.PathLike[str]) -> str:
    """The folder or the hub's name of a model; a path that leads nowhere is not looked up on the hub."""
    name = os.fspath(model)
    if name == "embedded":
        return embedded.path()
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"model must be a folder with a config.json, which {name} has not")
        return str(folder)
    if not isinstance(model, str) or name.startswith(("/", ".", "~")) or name.endswith("/") or name.count("/") > 1:
        raise FileNotFoundError(f"model must be a name or a folder with a saved model; there is no folder {name}")
    name = ALIASES.get(name, name)
    return f"EleutherAI/{name}" if name.startswith("pythia-") else name


def from_pretrained(source: str, dtype: torch.dtype) -> Any:
    import transformers

    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    name = "dtype" if (major, minor) >= (4, 56) else "torch_dtype"
    return transformers.AutoModelForCausalLM.from_pretrained(source, **{name: dtype})


def load_tokenizer(source: str) -> Any:
    folder = Path(source)
    if folder.is_dir() and not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source)
