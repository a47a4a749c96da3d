"""The fast parts of a CPU's blocks: the model's numbers, on the LM's own modules alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
from lm_models import FAMILIES, random_model, random_tokens
from torch import Tensor, nn

from e2e_fast import SAE, cpu_blocks, kernels, load_lm, losses
from e2e_fast.kernels import reference
from e2e_fast.step import training_step

REAL = ["babyllama-char", "stories260K", "tiny-gpt2"]
POSITION = "blocks.1.hook_resid_pre"


def log_probabilities_and_gradient(model: Any, tokens: Tensor, fast: bool) -> tuple[Tensor, Tensor]:
    """Of the spliced run on the stream at block 1, by the LM's parts."""
    lm = load_lm(model, processing="none")
    original = lm.original(tokens, at=POSITION, fast=fast)
    x = original[POSITION].clone().requires_grad_()
    logits = original.splice(x).logits()
    return nnf.log_softmax(original.logits(), -1), torch.autograd.grad(logits.tanh().sum(), x)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_and_gradients_are_the_models(family: str) -> None:
    model, tokens = random_model(family), random_tokens(3, 23)
    ours = log_probabilities_and_gradient(model, tokens, fast=True)
    whole = nnf.log_softmax(model(tokens).logits.detach(), -1)
    _, gradient = log_probabilities_and_gradient(model, tokens, fast=False)
    torch.testing.assert_close(ours[0], whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours[1], gradient, rtol=0, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.shared
@pytest.mark.parametrize("name", REAL)
def test_trained_models_keep_their_log_probabilities(name: str, shared: Path) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(shared / "models" / name).float().eval()
    tokens = torch.randint(model.config.vocab_size, (2, 77), generator=torch.Generator().manual_seed(0))
    ours = nnf.log_softmax(load_lm(model, processing="none").original(tokens, fast=True).logits(), -1)
    theirs = nnf.log_softmax(model(tokens).logits.detach(), -1)
    exact = nnf.log_softmax(model.double()(tokens).logits.detach(), -1)
    assert (ours - exact).abs().max() <= 1.5 * (theirs - exact).abs().max() + 1e-6
    assert (ours - exact).norm() <= 1.2 * (theirs - exact).norm()


def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts calls of our parts."""
    counts = {"attention": 0, "gelu": 0, "frozen_linear": 0, "branch": 0}

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    for name in counts:
        owner = cpu_blocks if name == "frozen_linear" else kernels
        monkeypatch.setattr(owner, name, counted(name, getattr(owner, name)))
    return counts


@pytest.mark.parametrize(
    ("family", "a_block"),
    [
        ("gpt2", (1, 0, 0, 3)), ("gpt_neo", (1, 0, 0, 5)), ("gpt_neox", (1, 1, 4, 0)), ("llama", (1, 0, 7, 0)),
        ("gemma", (1, 1, 7, 0)), ("gemma2", (1, 1, 7, 0)), ("gemma3_text", (1, 1, 7, 0)), ("mistral", (1, 0, 7, 0)),
    ],
)  # fmt: skip
def test_these_parts_of_a_block_are_ours(
    family: str, a_block: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = load_lm(random_model(family))
    counts = calls(monkeypatch)
    lm.original(random_tokens(), fast=True)
    assert tuple(counts.values()) == tuple(lm.n_layers * n for n in a_block)


@pytest.mark.parametrize(("family", "products"), [("gpt2", 4), ("gpt_neo", 6)])
def test_blocks_run_in_parts_where_a_graph_is_recorded_or_one_is_seen(
    family: str, products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = load_lm(random_model(family))
    original = lm.original(random_tokens(), at=POSITION, fast=True)
    counts = calls(monkeypatch)
    original.splice(original[POSITION].clone().requires_grad_()).run_to_end()
    assert tuple(counts.values()) == (2, 2, 2 * products, 0)
    lm.original(random_tokens(), at="blocks.1.hook_attn_out", fast=True, suffix=False)
    assert tuple(counts.values()) == (4, 3, 3 * products, products - 1)


def test_wide_blocks_run_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = calls(monkeypatch)
    load_lm(random_model("gpt2", n_embd=cpu_blocks.WIDEST + 4)).original(random_tokens(), fast=True)
    assert counts["branch"] == 0


@pytest.mark.parametrize(
    "changes",
    [{"activation_function": "relu"}, {"attn_implementation": "eager"}, {"scale_attn_by_inverse_layer_idx": True}],
    ids=str,
)
def test_unusual_gpt2s_give_their_own_numbers(changes: dict[str, Any]) -> None:
    model, tokens = random_model("gpt2", **changes), random_tokens(3, 23)
    ours = nnf.log_softmax(load_lm(model, processing="none").original(tokens, fast=True).logits(), -1)
    torch.testing.assert_close(ours, nnf.log_softmax(model(tokens).logits.detach(), -1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "gemma", "qwen3", "gemma2", "mistral"])
def test_a_pass_that_does_not_ask_for_speed_runs_as_the_model_does(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = random_model(family), random_tokens(3, 23)
    lm = load_lm(model, processing="none")
    lm.original(tokens, fast=True)
    counts = calls(monkeypatch)
    original = lm.original(tokens, at=POSITION)
    logits = original.splice(original[POSITION]).logits()
    assert not any(counts.values())
    assert torch.equal(logits, model(tokens).logits)


def test_splices_and_training_steps_are_as_fast_as_their_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = load_lm(random_model("llama"))
    counts = calls(monkeypatch)
    original = lm.original(random_tokens(), at=POSITION, fast=True)
    original.restrict([POSITION]).splice(original[POSITION]).run_to_end()
    assert counts["attention"] == 2 * lm.n_layers - 1
    training_step(lm, {POSITION: SAE(lm.d_model, 8)}, losses.e2e(1.0), random_tokens())
    assert counts["attention"] == 2 * (2 * lm.n_layers - 1)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt_neo", {"window_size": 1}), ("gpt_neo", {"window_size": 30}), ("mistral", {"sliding_window": 3}),
        ("gemma2", {"sliding_window": 3, "query_pre_attn_scalar": 3}), ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"attn_logit_softcapping": 0.5, "num_key_value_heads": 1}),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("tokens", [2, 19])
def test_windows_caps_and_scales_of_attention_are_the_models(family: str, changes: dict[str, Any], tokens: int) -> None:
    model, batch = random_model(family, **changes), random_tokens(3, tokens)
    ours = log_probabilities_and_gradient(model, batch, fast=True)
    theirs = log_probabilities_and_gradient(model, batch, fast=False)
    exact = log_probabilities_and_gradient(model.double(), batch, fast=False)
    for got, usual, want in zip(ours, theirs, exact, strict=True):
        assert (got - want).norm() <= 2 * (usual - want).norm() + 2e-7 * want.norm()
        torch.testing.assert_close(got, usual, rtol=0, atol=2e-5 * max(1, float(usual.abs().max())))


@pytest.mark.parametrize("additive", [False, True])
def test_attention_masks_are_read_once_for_what_they_are(additive: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    causal = reference.seen_keys(9, None, torch.device("cpu"))
    masks = {
        "causal": causal,
        "window": causal.triu(-3),
        "padded": causal & (torch.arange(9) > 1),
        "short": causal[-1:],
    }
    if additive:
        masks = {name: torch.zeros(mask.shape).masked_fill(~mask, -3e38) for name, mask in masks.items()}
    expected = {"causal": 9, "window": 4, "padded": 0, "short": 0}
    for name, mask in masks.items():
        assert cpu_blocks._window(mask[None, None], 9, 4) == expected[name]
        kept = mask.expand(2, 1, -1, -1)
        assert cpu_blocks._window(kept, 9, 4) == expected[name]
        with monkeypatch.context() as patch:
            patch.setattr(reference, "seen_keys", None)
            assert cpu_blocks._window(kept, 9, 4) == expected[name]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_run_as_the_model_does(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = random_model("llama").to(dtype), random_tokens()
    lm = load_lm(model, processing="none")
    counts = calls(monkeypatch)
    ours = lm.original(tokens, fast=True).final
    assert not any(counts.values())
    assert torch.equal(ours, model.model(tokens).last_hidden_state)


def test_autocast_runs_as_the_model_does(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = load_lm(random_model("llama"))
    counts = calls(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        original = lm.original(random_tokens(), at="blocks.0.hook_attn_out", fast=True)
    assert original["blocks.0.hook_attn_out"].dtype == torch.bfloat16
    assert not any(counts.values())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_users_model_is_not_changed(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = random_model(family), random_tokens()
    kinds = [(name, type(module)) for name, module in model.named_modules()]
    implementation, before = model.config._attn_implementation, model(tokens).logits
    lm = load_lm(model, processing="none")
    lm.original(tokens, fast=True)
    assert [(name, type(module)) for name, module in model.named_modules()] == kinds
    assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} == {implementation}
    counts = calls(monkeypatch)
    assert torch.equal(model(tokens).logits, before)
    assert not any(counts.values())


def test_weights_stay_shared_with_the_users_model() -> None:
    model, tokens = random_model("gpt2"), random_tokens()
    lm = load_lm(model, processing="none")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight.mul_(2)
    torch.testing.assert_close(
        lm.original(tokens, fast=True).final, model.transformer(tokens).last_hidden_state.detach()
    )


def test_attention_with_a_mask_or_dropout_is_sdpas() -> None:
    q, k, v = (torch.randn(2, 4, 9, 8) for _ in range(3))
    module, seen = nn.Module(), torch.rand(2, 1, 9, 9) < 0.7
    mode = vars(module)[cpu_blocks.MODE] = cpu_blocks.Mode()
    mode.fast = True
    seen |= torch.eye(9, dtype=torch.bool)
    out, _ = cpu_blocks._attend(module, q, k, v, seen, scaling=0.5)
    expected = nnf.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.5)
    torch.testing.assert_close(out, expected.transpose(1, 2))
    out, _ = cpu_blocks._attend(module, q, k, v, None, is_causal=False)
    torch.testing.assert_close(out, nnf.scaled_dot_product_attention(q, k, v).transpose(1, 2))


def test_documented_example_runs() -> None:
    import doctest

    assert doctest.testmod(cpu_blocks).failed == 0
