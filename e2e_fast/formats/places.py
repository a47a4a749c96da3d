"""Where an SAE sits: TransformerLens' names of positions against the module names of Hugging Face models.

An SAE on the output of a Hugging Face module sees raw activations. The output of block L is
``blocks.L.hook_resid_post``, that of its MLP ``hook_mlp_out``, that of its attention ``hook_attn_out``. Other modules
(embeddings, norms, inner layers) have no position here. Gemma 2 and 3 put a norm between these modules and the residual
stream, so there the module's output is not what TransformerLens calls by that name.

>>> of_module("layers.6"), of_module("h.3.mlp"), of_module("embed_tokens")
('blocks.6.hook_resid_post', 'blocks.3.hook_mlp_out', None)
"""

import re

OUR_KEY = "e2e_fast"
"""In the settings of formats that have no place for it: {"position": …, "model": …, "lm_processing": …}."""

_STAGES = {"": "hook_resid_post", "mlp": "hook_mlp_out"} | dict.fromkeys(
    ("attn", "self_attn", "attention"), "hook_attn_out"
)
_MODULE = re.compile(r"(?:.*\.)?(?:h|layers|blocks)[._](\d+)(?:\.(\w+))?")
_POST_NORMS = re.compile(r"gemma-?[23]", re.IGNORECASE)


def of_module(module: str, model: str | None = None) -> str | None:
    """The position of a Hugging Face module's output, named from the base model on; None where there is none."""
    match = _MODULE.fullmatch(module)
    if match is None or (match[2] or "") not in _STAGES:
        return None
    if match[2] and model is not None and _POST_NORMS.search(model):
        return None
    return f"blocks.{match[1]}.{_STAGES[match[2] or '']}"


def ours(settings: dict, position: str | None, model: str | None, lm_processing: str | None) -> dict:
    """``settings`` with our key, for what is known of the place."""
    place = {"position": position, "model": model, "lm_processing": lm_processing}
    known = {key: value for key, value in place.items() if value is not None}
    rest = {key: value for key, value in settings.items() if key != OUR_KEY}
    return rest | ({OUR_KEY: known} if known else {})
