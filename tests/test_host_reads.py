"""A step that does not log reads nothing back: on the meta device, where tensors have no values, it runs to its end.

Reading a value, ``nonzero``, boolean masks and copies to the CPU raise on that device, so this holds for the original
pass, SAE, splice, losses, backward, accumulation, clipping, Adam, feature counts and the draw of KL positions. What
the GPU's own kernels do inside is not seen here.
"""

from typing import Any

import pytest
import tiny
import torch
from tiny import AT, LAST, LATER
from torch.utils._pytree import tree_map_only

import e2e_fast
from e2e_fast import losses
from e2e_fast.cuda_graphs import _AlwaysDense
from e2e_fast.lm_blocks import Call

SAES = {"sae_positions": AT, "dict_size_to_input_ratio": 3.0, "k": 4}
MODELS = {"gpt2": tiny.gpt2, "llama": tiny.llama}


def settings(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "n_samples": 64,
        "log_every_n_grad_steps": 4,
        "collect_act_frequency_every_n_samples": 10**6,
        "act_frequency_n_tokens": 10**6,
        "loss": losses.e2e_downstream(0.2, (LAST,)).model_dump(),
        "saes": SAES,
        "device": "cpu",
    }
    return tiny.settings(**(base | changes))


def without_values(trainer: e2e_fast.Trainer) -> None:
    """Moves a trainer to the meta device, with all that its first steps have made."""
    lm = trainer.lm
    calls = dict(lm._known_calls)
    lm.to("meta")

    def moved(call: Call) -> Call:
        return Call(*tree_map_only(torch.Tensor, lambda t: t.to("meta"), (call.args, call.kwargs)))

    lm._known_calls = {shape: [moved(call) for call in each] for shape, each in calls.items()}
    for member in trainer.members:
        for sae in member.saes.values():
            for parameter in sae.parameters():
                moved_parameter = torch.nn.Parameter(parameter.detach().to("meta"))
                torch.utils.swap_tensors(parameter, moved_parameter)
            if sae.k is None:
                sae.density = _AlwaysDense(sae.density.limit)  # on a GPU the counts are read when they have arrived
        member.optimizer.state.clear()
        member.optimizer.param_groups[0] |= {"fused": False, "foreach": True}  # torch has no fused one for this device
        if member.frequency is not None:
            member.frequency.counts = {p: c.to("meta") for p, c in member.frequency.counts.items()}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss": losses.local(0.2).model_dump()},
        {"loss": losses.balanced(0.2).model_dump(), "kl_positions": 0.3},
        {"saes": SAES | {"k": None}},
        {"saes": SAES | {"k": None, "activation": "jump_relu"}},
        {"saes": SAES | {"sae_positions": [AT, "blocks.2.hook_mlp_out"]}},
        {"sweep": {"seed": [0, 1], "sae_positions": [AT, LATER]}},
    ],
    ids=["topk", "local", "balanced, kl rows", "relu", "jump_relu", "two positions", "sweep"],
)
def test_a_step_that_does_not_log_reads_nothing_back(family: str, changes: dict[str, Any]) -> None:
    tokens: Any = tiny.tokens(64)
    trainer = e2e_fast.Trainer(settings(**changes), MODELS[family](), tokens, quiet=True)
    batches = iter(trainer._training_batches())
    trainer._micro_batch(next(batches))  # logs, as the first does, and makes the masks
    trainer._micro_batch(next(batches))
    without_values(trainer)
    for _ in range(5):
        tokens = next(batches)
        assert tokens.device.type == "meta"
        trainer._micro_batch(tokens)
    for member in trainer.members:
        assert (member.samples, member.grad_updates) == (28, 3)
        assert member.frequency is not None
        assert member.frequency.tokens == 7 * 4 * 16
    with pytest.raises((RuntimeError, NotImplementedError), match="meta tensor"):
        trainer._micro_batch(next(batches))  # the fourth update logs: reading does raise
    trainer.batches.close()
