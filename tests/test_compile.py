"""torch.compile of the blocks: equal to eager, really active, and few graphs whatever the batches."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from lm_models import FAMILIES, VOCAB, random_model, random_tokens
from torch._dynamo.exc import Unsupported

import e2e_fast
from e2e_fast import load_lm, losses
from e2e_fast.compiled import CompiledBlocks
from e2e_fast.lm import LM

pytestmark = [  # both are torch's own: it looks whether inputs have a gradient, and inductor uses torch.jit
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
]

AT, LATER = "blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"
EPSILON = 1e-5
"""Relative; float32 on 3 layers of width 32. The backends fuse, so sums round in another order."""


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def kl_and_gradient(lm: LM, tokens: torch.Tensor, at: str = AT) -> tuple[torch.Tensor, torch.Tensor]:
    original = lm.original(tokens, at=at, downstream=LATER)
    x_hat = (original[at] * 0.7).requires_grad_()
    spliced = original.splice(x_hat)
    loss = spliced.kl() + spliced.mse(LATER)
    return loss.detach(), torch.autograd.grad(loss, x_hat)[0]


def assert_like_eager(compiled: LM, eager: LM, tokens: torch.Tensor, at: str = AT) -> None:
    (loss, gradient), (exact, exact_gradient) = (kl_and_gradient(lm, tokens, at) for lm in (compiled, eager))
    torch.testing.assert_close(loss, exact, rtol=EPSILON, atol=0)
    assert (gradient - exact_gradient).abs().max() <= EPSILON * exact_gradient.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_blocks_equal_eager_ones_and_share_their_graphs(family: str) -> None:
    eager, compiled = (load_lm(random_model(family)) for _ in range(2))
    compiled.compile("aot_eager")
    assert compiled.compiled is not None
    kinds = 2 if family == "gemma3_text" else 1  # its windowed layers differ from the others by numbers, not masks
    for passes in (1, 2):
        assert_like_eager(compiled, eager, random_tokens())
        assert compiled.compiled.runs == passes * (3 + 2)  # three blocks of the original, two of the spliced pass
        assert compiled.compiled.graphs == kinds * 2  # with and without gradients


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_inductor_equals_eager_also_for_a_smaller_last_batch(family: str) -> None:
    eager, compiled = load_lm(random_model(family)), load_lm(random_model(family), compile=True)
    assert compiled.compiled is not None
    assert compiled.compiled.backend == "inductor"
    for batch in (4, 4, 3):
        assert_like_eager(compiled, eager, random_tokens(batch))
    assert compiled.compiled.runs == 3 * 5
    assert compiled.compiled.graphs <= 6


@pytest.mark.parametrize("batches", [range(1, 12), [4, 1, 4, 1, 3, 2, 1, 4]], ids=["every size", "back and forth"])
def test_the_number_of_graphs_stays_small_over_varying_batches(batches: Any) -> None:
    lm = load_lm(random_model("gpt2")).compile("aot_eager")
    assert lm.compiled is not None
    for batch in batches:
        for length in (13, 7):
            kl_and_gradient(lm, random_tokens(batch, length))
    assert lm.compiled.graphs <= 2 + 3 * 4


def test_a_position_inside_a_block_runs_that_block_in_parts_and_the_others_compiled() -> None:
    eager, lm = (load_lm(random_model("gpt2")) for _ in range(2))
    lm.compile("aot_eager")
    assert lm.compiled is not None
    assert_like_eager(lm, eager, random_tokens(), at="blocks.1.hook_mlp_out")
    assert lm.compiled.runs == 2 + 1


def test_compile_that_is_switched_off_is_an_error() -> None:
    lm = load_lm(random_model("gpt2")).compile("aot_eager")
    lm.original(random_tokens(), at=AT)
    torch.compiler.set_stance("force_eager")
    try:
        with pytest.raises(RuntimeError, match="block 0 ran without its compiled graph"):
            lm.original(random_tokens(), at=AT)
    finally:
        torch.compiler.set_stance("default")


def test_a_block_that_cannot_be_compiled_whole_is_an_error() -> None:
    class Breaking(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return -x if x.sum() > 0 else x

    with pytest.raises(Unsupported):
        CompiledBlocks([Breaking()], "aot_eager")(0, torch.ones(2))


def test_a_compiled_lm_that_moves_compiles_anew_and_one_that_is_given_stays_as_it_is() -> None:
    lm = load_lm(random_model("gpt2")).compile("aot_eager")
    first = lm.compiled
    assert load_lm(lm, compile=True) is lm
    assert lm.compiled is first
    lm.to("cpu")
    assert lm.compiled is not first
    assert lm.compiled is not None
    assert lm.compiled.backend == "aot_eager"
    assert load_lm(load_lm(random_model("gpt2")), compile=True).compiled is not None


def settings(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "tlens_model_name": "tiny",
        "save_dir": None,
        "save_every_n_samples": None,
        "eval_n_samples": None,
        "batch_size": 4,
        "lr": 1e-3,
        "lr_schedule": "linear",
        "max_grad_norm": 1.0,
        "log_every_n_grad_steps": 1,
        "collect_act_frequency_every_n_samples": 0,
        "loss": losses.e2e_downstream(0.2, (LATER,)).model_dump(),
        "train_data": {"dataset_name": "given", "tokenizer_name": "none", "split": "train", "n_ctx": 12},
        "saes": {"sae_positions": AT, "dict_size_to_input_ratio": 3.0},
        "device": "cpu",
    }
    return base | changes


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_sweep_trains_compiled_as_it_trains_eagerly(family: str, precision: str) -> None:
    tokens = np.random.default_rng(0).integers(VOCAB, size=(18, 12))  # four batches of 4 and one of 2
    config = settings(sweep={"seed": [0, 1]}, precision=precision)
    lm = load_lm(random_model(family)).compile("aot_eager")
    compiled: Any = e2e_fast.train(config, lm, tokens, quiet=True)
    eager: Any = e2e_fast.train(config, random_model(family), tokens, quiet=True)
    assert lm.compiled is not None
    assert lm.compiled.runs == 5 * (3 + 2 * 2)  # five batches: three blocks once, two of each member
    assert lm.compiled.graphs <= 6
    # Gradients round otherwise, and training carries that on: in bf16 it may take a metric as far as bf16 itself does.
    exact: Any = e2e_fast.train(settings(sweep={"seed": [0, 1]}), random_model(family), tokens, quiet=True)
    for ours, theirs, fp32 in zip(compiled, eager, exact, strict=True):
        assert len(ours.history) == 6
        rows = list(zip(theirs.history, fp32.history, strict=True))
        for row, expected in zip(ours.history, theirs.history, strict=True):
            for key, value in row.items():
                rounding = max(abs(a[key] - b[key]) for a, b in rows if key in a)
                assert value == pytest.approx(expected[key], rel=1e-3, abs=1e-4 + rounding), key


def test_the_configuration_asks_for_it() -> None:
    tokens = np.random.default_rng(0).integers(VOCAB, size=(8, 12))
    trainer = e2e_fast.Trainer(settings(compile=True), random_model("gpt2"), tokens, quiet=True)
    assert trainer.lm.compiled is not None
    trainer.fit()
    assert trainer.lm.compiled.runs == 2 * (3 + 2)
    assert e2e_fast.Trainer(settings(), random_model("gpt2"), tokens, quiet=True).lm.compiled is None
