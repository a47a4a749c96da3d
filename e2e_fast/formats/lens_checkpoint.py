"""Language models that e2e_sae trained with TransformerLens: ``tlens_model_path``, an ``epoch_N.pt`` in its run folder.

The file holds a ``HookedTransformer``'s tensors, ``final_config.yaml`` beside it the architecture (``tlens_config``).
e2e_sae runs such a model as it is, without the processing that TransformerLens gives pretrained ones. Needs
TransformerLens 3, since 4 has no HookedTransformer.

>>> read(Path("nowhere/epoch_1.pt"))
Traceback (most recent call last):
...
FileNotFoundError: there is no language model nowhere/epoch_1.pt
"""

from pathlib import Path
from typing import Any

import torch

from e2e_fast import files

SETTINGS = "final_config.yaml"


def read(path: Path) -> tuple[Any, str | None]:
    """(the HookedTransformer on the CPU, its tokenizer's name).

    Raises FileNotFoundError without the file, ValueError without its architecture or TransformerLens 3, and for tensors
    that do not fit.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no language model {path}")
    beside = path.parent / SETTINGS
    settings = files.load_yaml(beside) if beside.is_file() else {}
    if "tlens_config" not in settings:
        raise ValueError(f"{path} is a weight file: {beside} must say under tlens_config what model it is of")
    try:
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    except ImportError as error:
        raise ValueError(f"{path} is a HookedTransformer: reading it needs transformer-lens<4") from error
    architecture = dict(settings["tlens_config"])
    name = architecture.pop("tokenizer_name", None)  # loaded when it is asked for
    architecture["dtype"] = getattr(torch, architecture.get("dtype") or "float32")
    model = HookedTransformer(HookedTransformerConfig(**architecture, device="cpu"))
    found = model.load_state_dict(files.load_tensors(path), strict=False)
    parameters = {name for name, _ in model.named_parameters()}
    if wrong := sorted(parameters.intersection(found.missing_keys)) or found.unexpected_keys:
        raise ValueError(f"{path} does not fit the model in {beside}: {wrong[0]} is lacking or unknown")
    return model, name
