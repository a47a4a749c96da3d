"""The language model cut at hook points: it must stay the same function, and its gradients the same."""

import copy
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from lm_models import CONTEXT, FAMILIES, LAYERS, VOCAB, WIDTH, random_model, random_tokens
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from e2e_fast import lm as lm_module
from e2e_fast.lm import load_lm

PRE, LATER = "blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"
REAL_MODELS = ("stories260K", "babyllama-char", "tiny-gpt2")
ROOT = Path(__file__).resolve().parents[1]


def log_probs(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1)


def blocks_of(model: Any) -> nn.ModuleList:
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


def run_unsplit(model: Any, tokens: Tensor, replace: dict[int, Callable[[Tensor], Tensor]]) -> Tensor:
    """Logits of the whole model while hooks replace the input of some blocks."""

    def hook(f: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        return lambda _, args: (f(args[0]), *args[1:])

    handles = [blocks_of(model)[layer].register_forward_pre_hook(hook(f)) for layer, f in replace.items()]
    try:
        return model(tokens).logits
    finally:
        for handle in handles:
            handle.remove()


# ------------------------------------------------------------------------------------------------- the same function


@pytest.mark.parametrize("processing", ["transformer_lens", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_splicing_the_original_activation_back_changes_nothing(family: str, processing: str) -> None:
    model, tokens = random_model(family), random_tokens()
    lm = load_lm(model, processing)
    with torch.no_grad():
        whole = log_probs(model(tokens).logits)
        original = lm.original(tokens, at=lm.positions())
        assert (log_probs(original.logits()) - whole).abs().max() <= 1e-5
        for position in lm.positions():
            spliced = original.splice({position: original[position].clone()})
            assert (log_probs(spliced.logits()) - whole).abs().max() <= 1e-5, position
            assert abs(float(spliced.kl())) <= 1e-5, position


@pytest.mark.shared
@pytest.mark.parametrize(("processing", "dtype"), [("none", torch.float32), ("transformer_lens", torch.float64)])
@pytest.mark.parametrize("name", REAL_MODELS)
def test_splicing_back_changes_nothing_in_real_models(
    name: str, processing: str, dtype: torch.dtype, shared: Path
) -> None:
    # Processing rounds the weights anew. In float32 that moves log-probabilities of -30 by 2e-5, as much as the model's
    # own rounding does (1.5e-5 against float64), so the processed model is compared in float64.
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(shared / "models" / name)
    model = model.to(dtype).eval()
    lm = load_lm(model, processing)
    tokens = torch.randint(lm.d_vocab, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = log_probs(model(tokens).logits)
        original = lm.original(tokens, at=lm.positions())
        for position in lm.positions():
            spliced = original.splice({position: original[position]})
            bound = 1e-5 if dtype == torch.float32 else 1e-10
            assert (log_probs(spliced.logits()) - whole).abs().max() <= bound, position


@pytest.mark.shared
@pytest.mark.parametrize("name", REAL_MODELS)
def test_splicing_back_changes_nothing_in_processed_real_models_in_float32(name: str, shared: Path) -> None:
    lm = load_lm(shared / "models" / name)
    tokens = torch.randint(lm.d_vocab, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        original = lm.original(tokens, at=lm.positions())
        for position in lm.positions():
            spliced = original.splice({position: original[position]})
            assert (log_probs(spliced.logits()) - log_probs(original.logits())).abs().max() <= 1e-5, position


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_without_processing_are_the_models_own(family: str) -> None:
    """To the bit, but for GPT-2's and GPT-Neo's GELU of seven operations, which is torch's in an LM."""
    model, tokens = random_model(family), random_tokens()
    error = None if family in ("gpt2", "gpt_neo") else 0
    with torch.no_grad():
        ours, theirs = load_lm(model, "none").original(tokens).logits(), model(tokens).logits
    torch.testing.assert_close(ours, theirs, rtol=error, atol=error)


@pytest.mark.parametrize("family", FAMILIES)
def test_processed_models_are_centred_where_transformer_lens_centres(family: str) -> None:
    lm = load_lm(random_model(family))
    original = lm.original(random_tokens(), at=lm.positions())
    streams = [p for p in lm.positions() if "mlp.hook" not in p]
    means = torch.stack([original[p].mean(-1).abs().max() for p in streams])
    if family.startswith("gpt"):
        assert means.max() < 1e-5
    else:
        assert means.min() > 1e-2
    logit_mean = original.logits().mean(-1).abs().max()
    assert logit_mean > 1e-2 if family == "gemma2" else logit_mean < 1e-5


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_of_the_unsplit_model(family: str, layer: int) -> None:
    model, tokens = random_model(family), random_tokens()
    lm, position = load_lm(model, "none"), f"blocks.{layer}.hook_resid_pre"
    original = lm.original(tokens, at=position)
    noise = torch.randn(original[position].shape, generator=torch.Generator().manual_seed(2))
    ours = (original[position] + 0.3 * noise).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()

    kl = original.splice(ours).kl()
    kl.backward()
    expected = nnf.kl_div(
        log_probs(run_unsplit(model, tokens, {layer: lambda _: theirs})).flatten(0, 1),
        log_probs(model(tokens).logits).detach().flatten(0, 1),
        log_target=True,
        reduction="batchmean",
    )
    expected.backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    torch.testing.assert_close(kl, expected, rtol=1e-4, atol=1e-6)
    assert (ours.grad - theirs.grad).abs().max() <= 1e-4 * theirs.grad.abs().max()


def test_kl_and_mse_of_later_activations_are_what_torch_computes() -> None:
    lm = load_lm(random_model("gpt2"))
    original = lm.original(random_tokens(), at=PRE, downstream=[LATER])
    spliced = original.splice(original[PRE] * 0.8 + 0.1)
    expected = nnf.kl_div(
        log_probs(spliced.logits()).flatten(0, 1),
        log_probs(original.logits()).flatten(0, 1),
        log_target=True,
        reduction="batchmean",
    )
    torch.testing.assert_close(spliced.kl(), expected)
    assert spliced[LATER].shape == original[LATER].shape
    torch.testing.assert_close(spliced.mse(LATER), ((spliced[LATER] - original[LATER]) ** 2).mean())
    assert spliced.mse(LATER) > 1e-3


# ------------------------------------------------------------------------------------------------- several positions


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma2"])
def test_a_later_replacement_sees_what_the_earlier_one_did(family: str) -> None:
    model, tokens = random_model(family), random_tokens()
    scale = torch.tensor([0.7, 1.2], requires_grad=True)
    twin = scale.detach().clone().requires_grad_()
    lm = load_lm(model, "none")
    original = lm.original(tokens, at=[LATER, PRE])
    spliced = original.splice({LATER: lambda x: x * scale[1], PRE: lambda x: x * scale[0]})
    whole = run_unsplit(model, tokens, {1: lambda x: x * twin[0], 2: lambda x: x * twin[1]})

    torch.testing.assert_close(log_probs(spliced.logits()), log_probs(whole), rtol=0, atol=1e-5)
    torch.testing.assert_close(spliced[PRE], original[PRE])
    assert (spliced[LATER] - original[LATER]).abs().max() > 0.1
    weights = torch.randn(whole.shape, generator=torch.Generator().manual_seed(3))
    (log_probs(spliced.logits()) * weights).sum().backward()
    (log_probs(whole) * weights).sum().backward()
    torch.testing.assert_close(scale.grad, twin.grad, rtol=1e-4, atol=1e-4)


def test_positions_left_out_of_a_splice_stay_as_they_are() -> None:
    lm = load_lm(random_model("gpt2"))
    original = lm.original(random_tokens(), at=[PRE, LATER])
    both = original.splice({PRE: original[PRE], LATER: original[LATER] * 0.5})
    one = original.splice({LATER: original[LATER] * 0.5})
    torch.testing.assert_close(one.logits(), both.logits())


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_of_other_shapes_and_modes_do_not_disturb_each_other(family: str) -> None:
    model = random_model(family, pad_token_id=0)
    lm = load_lm(model, "none")
    shapes = [(2, 13), (3, 7), (2, 13), (1, 20), (3, 7), (2, 24), (5, 3), (2, 13)]
    with torch.inference_mode():
        lm.original(random_tokens(2, 13))
    for seed, (batch, length) in enumerate(shapes):
        tokens = random_tokens(batch, length, seed)
        original = lm.original(tokens, at=PRE)
        x_hat = original[PRE].clone().requires_grad_()
        spliced = original.splice(x_hat).logits()
        with torch.no_grad():
            whole = model(tokens, attention_mask=torch.ones_like(tokens)).logits
        torch.testing.assert_close(log_probs(spliced), log_probs(whole), rtol=0, atol=1e-5)
        spliced.sum().backward()


def test_every_pair_of_positions_in_one_block_can_be_replaced_together() -> None:
    lm = load_lm(random_model("llama"))
    stages = [p for p in lm.positions() if p.startswith("blocks.1.")]
    original = lm.original(random_tokens(), at=stages)
    for i, early in enumerate(stages):
        for late in stages[i + 1 :]:
            affected = original.splice({early: original[early] * 0.5})
            arrives: list[Tensor] = []
            both = original.splice({early: original[early] * 0.5, late: lambda x, seen=arrives: seen.append(x) or x})
            torch.testing.assert_close(both.logits(), affected.logits(), msg=f"{early}, {late}")
            torch.testing.assert_close(arrives[0], affected[late], msg=f"{early}, {late}")


def test_a_downstream_position_before_the_splice_is_the_original_one() -> None:
    lm = load_lm(random_model("gpt2"))
    original = lm.original(random_tokens(), at=LATER, downstream=[PRE])
    spliced = original.splice(original[LATER] * 2)
    assert spliced[PRE] is original[PRE]
    assert float(spliced.mse(PRE)) == 0.0


# ----------------------------------------------------------------------------------------------------- what it costs


def count_block_calls(lm: Any) -> list[int]:
    calls = [0] * lm.n_layers

    def count(layer: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls[layer] += 1

        return hook

    for layer, block in enumerate(lm._blocks):
        block.register_forward_hook(count(layer))
    return calls


def test_the_prefix_runs_once_and_a_splice_runs_only_the_blocks_after_it() -> None:
    lm = load_lm(random_model("llama"))
    calls = count_block_calls(lm)
    original = lm.original(random_tokens(), at=PRE)
    assert calls == [1, 1, 1]
    for _ in range(2):
        original.splice(original[PRE]).kl()
    assert calls == [1, 3, 3]


def test_without_suffix_no_block_after_the_last_activation_runs() -> None:
    lm = load_lm(random_model("gpt2"))
    calls = count_block_calls(lm)
    original = lm.original(random_tokens(), at=PRE, suffix=False)
    assert calls == [1, 0, 0]
    spliced = lm.original(random_tokens(), at="blocks.0.hook_resid_post", downstream=[LATER], suffix=False)
    assert calls == [2, 1, 0]
    assert float(spliced.splice(spliced["blocks.0.hook_resid_post"]).mse(LATER)) < 1e-12
    assert calls == [2, 2, 0]
    torch.testing.assert_close(original[PRE], lm.original(random_tokens(), at=PRE)[PRE])
    for read in (lambda: original.final, original.logits, original.splice(original[PRE]).kl):
        with pytest.raises(RuntimeError, match="suffix=False"):
            read()


class RefuseSyncs(TorchDispatchMode):
    """Fails on operations that a GPU would have to be waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"):
            raise AssertionError(f"{name} would synchronise")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_neither_pass_waits_for_a_gpu(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, tokens = load_lm(random_model(family, pad_token_id=0)), random_tokens()
    tokens[:, -1] = 0
    monkeypatch.setattr(lm, "check_tokens", lambda _: None)  # done for CPU tokens only
    lm.original(tokens)  # the first batch of a shape makes the masks, and may wait
    with RefuseSyncs():
        original = lm.original(tokens, at=["blocks.0.mlp.hook_post", PRE], downstream=[LATER])
        x_hat = {p: (original[p] * 0.9).requires_grad_() for p in original.at}
        spliced = original.splice(x_hat)
        (spliced.kl() + spliced.mse(LATER)).backward()
    assert x_hat[PRE].grad is not None


# ----------------------------------------------------------------------------------------------- the model is frozen


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
def test_the_users_model_is_left_as_found(family: str) -> None:
    model, tokens = random_model(family), random_tokens()
    model.train()
    next(model.parameters()).requires_grad_(False)
    before, flags = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    identity = [id(m) for m in model.modules()]

    lm = load_lm(model)
    original = lm.original(tokens, at=lm.positions())
    spliced = original.splice({p: (original[p] * 0.9).requires_grad_() for p in lm.positions()})
    spliced.kl().backward()
    lm.to("meta")

    assert model.training
    assert all(m.training for m in model.modules())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None and p.device.type == "cpu" for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert [id(m) for m in model.modules()] == identity
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert lm.device.type == "meta"


def test_weights_are_shared_where_processing_does_not_change_them() -> None:
    model = random_model("gpt2")
    raw, processed = load_lm(model, "none"), load_lm(model)
    assert raw.unembed.weight.data_ptr() == model.lm_head.weight.data_ptr()
    assert processed._blocks[0].mlp.c_fc.weight.data_ptr() == model.transformer.h[0].mlp.c_fc.weight.data_ptr()
    assert processed._blocks[0].mlp.c_proj.weight.data_ptr() != model.transformer.h[0].mlp.c_proj.weight.data_ptr()
    assert raw._front.wte.weight is raw.unembed.weight  # tied weights stay tied, and move together


def test_no_weight_of_the_lm_receives_a_gradient() -> None:
    lm = load_lm(random_model("gpt2"))
    original = lm.original(random_tokens(), at=PRE)
    x_hat = (original[PRE] * 0.5).requires_grad_()
    original.splice(x_hat).kl().backward()
    assert x_hat.grad is not None
    assert x_hat.grad.abs().max() > 0
    assert not any(p.requires_grad or p.grad is not None for p in lm._modules.parameters())
    assert not original[PRE].requires_grad


def test_dropout_and_the_users_hooks_stay_out() -> None:
    model, tokens = random_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5), random_tokens()
    expected = load_lm(model).original(tokens).logits()
    model.train()
    model.transformer.h[0].register_forward_hook(lambda *_: (_ for _ in ()).throw(AssertionError("user's hook ran")))
    torch.testing.assert_close(load_lm(model).original(tokens).logits(), expected)


# ---------------------------------------------------------------------------------------------------- what it is


def test_an_lm_describes_itself() -> None:
    lm = load_lm(random_model("llama"))
    assert (lm.d_model, lm.n_layers, lm.d_vocab, lm.n_ctx) == (WIDTH, LAYERS, VOCAB, CONTEXT)
    assert lm.device.type == "cpu"
    assert lm.dtype == torch.float32
    assert lm.tokenizer is None
    assert len(lm.positions()) == 7 * LAYERS
    assert lm.positions()[0] == "blocks.0.hook_resid_pre"
    assert lm.width("blocks.2.hook_mlp_out") == WIDTH
    assert lm.width("blocks.2.mlp.hook_post") == lm.width("blocks.0.mlp.hook_pre") == 48
    assert lm.unembed.weight.shape == (VOCAB, WIDTH)
    assert lm.unembed.bias is None
    assert lm.unembed.softcap is None


def test_attention_is_sdpa_where_the_model_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    count, sdpa = [0], nnf.scaled_dot_product_attention

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        count[0] += 1
        return sdpa(*args, **kwargs)

    lm = load_lm(random_model("llama"))
    monkeypatch.setattr(nnf, "scaled_dot_product_attention", counted)
    lm.original(random_tokens())
    assert count[0] == LAYERS


def test_logit_soft_cap_and_embedding_scale_of_gemma_are_kept() -> None:
    model = random_model("gemma2")
    lm = load_lm(model)
    assert lm.unembed.softcap == model.config.final_logit_softcapping
    original = lm.original(random_tokens(), at="blocks.0.hook_resid_pre")
    assert original.logits().abs().max() < model.config.final_logit_softcapping
    embedded = model.model.embed_tokens.weight[random_tokens()] * WIDTH**0.5
    torch.testing.assert_close(original["blocks.0.hook_resid_pre"], embedded.detach())


def test_the_language_model_of_a_multimodal_model_is_cut() -> None:
    import transformers

    text = random_model("gemma3_text").config
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.Gemma3Config(text_config=text.to_dict(), vision_config=vision)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    lm, tokens = load_lm(model, "none"), random_tokens()
    original = lm.original(tokens, at="blocks.1.hook_mlp_out")
    with torch.no_grad():
        expected = model(tokens).logits
    torch.testing.assert_close(original.logits(), expected)
    torch.testing.assert_close(original.splice(lambda x: x).logits(), expected)


@pytest.mark.shared
def test_a_folder_is_loaded_in_float32_unless_asked_otherwise(shared: Path) -> None:
    folder = shared / "models" / "stories260K"
    lm = load_lm(folder)
    assert lm.dtype == torch.float32
    assert lm.name == str(folder)
    assert lm.tokenizer("Once")["input_ids"]
    half = load_lm(str(folder), dtype=torch.bfloat16)
    assert half.original(torch.ones(1, 4, dtype=torch.int64)).final.dtype == torch.bfloat16
    assert load_lm(shared / "models" / "tiny-gpt2").tokenizer is None  # its vocab.json is no tokenizer's


def test_transformer_lens_names_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def load(source: str, dtype: torch.dtype) -> Any:
        asked.append(source)
        return random_model("gpt2")

    monkeypatch.setattr(lm_module, "from_pretrained", load)
    for name in ("gpt2-small", "pythia-14m", "roneneldan/TinyStories-1M"):
        load_lm(name)
    assert asked == ["gpt2", "EleutherAI/pythia-14m", "roneneldan/TinyStories-1M"]


def test_an_lm_is_returned_as_it_is() -> None:
    lm = load_lm(random_model("gpt2"), "none")
    assert load_lm(lm) is lm
    assert load_lm(lm, "none") is lm
    with pytest.raises(ValueError, match="'transformer_lens'"):
        load_lm(lm, "transformer_lens")


def test_importing_the_module_imports_no_transformers() -> None:
    code = (
        "import sys, e2e_fast.lm; bad = {'transformers', 'transformer_lens', 'triton', 'datasets'} & set(sys.modules);"
        "sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------------ bad input


def refuses(words: str) -> Any:
    return pytest.raises(ValueError, match=words)


def test_unknown_positions_are_refused_with_near_names() -> None:
    lm = load_lm(random_model("gpt_neox"))
    with refuses(r"'blocks.1.hook_resid_prr'.*near: blocks.1.hook_resid_pre"):
        lm.original(random_tokens(), at="blocks.1.hook_resid_prr")
    with refuses(r"'blocks.7.hook_resid_pre'.*3 layers"):
        lm.original(random_tokens(), downstream=["blocks.7.hook_resid_pre"])
    with refuses("in parallel, so there is no hook_resid_mid"):
        lm.width("blocks.1.hook_resid_mid")
    with refuses("there are blocks.0.hook_resid_pre"):
        lm.check_position("zzz")


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (torch.zeros(5, dtype=torch.int64), r"\[batch, sequence\].*got \[5\]"),
        (torch.zeros(0, 5, dtype=torch.int64), r"not empty, got \[0, 5\]"),
        ([[1, 2]], "got a list"),
        (torch.zeros(1, 5), "int64 or int32, got torch.float32"),
        (torch.zeros(1, CONTEXT + 1, dtype=torch.int64), f"n_ctx = {CONTEXT} long, got sequences of {CONTEXT + 1}"),
        (torch.tensor([[0, VOCAB]]), rf"\[0, {VOCAB}\).*got ids from 0 to {VOCAB}"),
        (torch.tensor([[3, -1]]), "got ids from -1 to 3"),
    ],
)
def test_bad_tokens_are_refused(tokens: Any, words: str) -> None:
    lm = load_lm(random_model("gpt2"))
    with refuses(words):
        lm.original(tokens)
    with refuses(words):
        lm.check_tokens(tokens)


def test_int32_tokens_are_taken() -> None:
    lm, tokens = load_lm(random_model("gpt2")), random_tokens()
    torch.testing.assert_close(lm.original(tokens.int()).logits(), lm.original(tokens).logits())


def test_bad_replacements_are_refused() -> None:
    lm = load_lm(random_model("gpt2"))
    one = lm.original(random_tokens(), at=PRE)
    x = one[PRE]
    with refuses(r"x_hat at blocks.1.hook_resid_pre .*\[2, 13, 32\] torch.float32.*got \[26, 32\]"):
        one.splice(x.flatten(0, 1))
    with refuses("got .*torch.float64"):
        one.splice(x.double())
    with refuses("got a tuple"):
        one.splice(lambda x: (x, x))  # pyright: ignore[reportArgumentType]
    with refuses("must name positions of at="):
        one.splice({LATER: x})
    with refuses("must name positions of at="):
        one.splice({})
    with refuses("where at= is not one position"):
        lm.original(random_tokens(), at=[PRE, LATER]).splice(x)
    with pytest.raises(KeyError, match="was not asked for"):
        one[LATER]


def test_models_that_cannot_be_cut_are_refused() -> None:
    import transformers

    with refuses("got a Linear"):
        load_lm(nn.Linear(2, 2))
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9, n_positions=8)
    with refuses("must be a causal LM"):
        load_lm(transformers.GPT2Model(config))
    opt = transformers.OPTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, ffn_dim=8, vocab_size=9, word_embed_proj_dim=8
    )
    with refuses("'opt' is not supported; supported: .*gpt2.*llama"):
        load_lm(transformers.OPTForCausalLM(opt))
    with refuses("processing must be one of"):
        load_lm(random_model("gpt2"), "centred")
    with refuses("dtype is for models loaded by name"):
        load_lm(random_model("gpt2"), dtype=torch.float16)
    patched = random_model("gpt2")
    patched.transformer.h[0].forward = lambda *args, **kwargs: args[0]
    with refuses("patched forward method in GPT2Block"):
        load_lm(patched)
    spread = random_model("gpt2")
    spread.transformer.wte._hf_hook = object()
    with refuses("device_map"):
        load_lm(spread)
    odd = random_model("gpt2")
    odd.lm_head.weight = type("Int8Params", (nn.Parameter,), {})(odd.lm_head.weight.detach())
    with refuses("plain weights, got Int8Params"):
        load_lm(odd)


def test_a_wrong_row_of_the_table_is_noticed_at_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    from e2e_fast.lm_architectures import ARCHITECTURES, GPT2

    monkeypatch.setitem(ARCHITECTURES, "gpt2", GPT2._replace(mlp=("ln_1", "mlp")))
    with refuses("do not compute what its family's row in the table says"):
        load_lm(random_model("gpt2"))


# ------------------------------------------------------------------------------------------------- reference results

GOLDEN = (
    "stories260K-local",
    "stories260K-e2e",
    "stories260K-e2e-downstream",
    "tiny-gpt2-e2e-downstream",
    "tiny-gpt2-e2e-two-positions",
)


def reference_sae(weights: dict[str, Tensor], position: str) -> Callable[[Tensor], Tensor]:
    """e2e_sae's SAE from its state dict: raw decoder columns, normalised on use."""
    prefix = position.replace(".", "-")
    W_enc, b_enc = weights[f"{prefix}.encoder.0.weight"], weights[f"{prefix}.encoder.0.bias"]
    W_dec, b_dec = nnf.normalize(weights[f"{prefix}.decoder.weight"], dim=0), weights[f"{prefix}.decoder.bias"]
    return lambda x: nnf.linear(torch.relu(nnf.linear(x, W_enc, b_enc)), W_dec, b_dec)


@pytest.mark.shared
@pytest.mark.parametrize("run", GOLDEN)
def test_the_reference_implementations_forward_pass_is_reproduced(run: str, shared: Path) -> None:
    from safetensors.torch import load_file

    folder = shared / "golden" / "e2e_sae" / run
    saved, weights = load_file(folder / "forward.safetensors"), load_file(folder / "final.safetensors")
    at = [key.removesuffix(".decoder.bias").replace("-", ".") for key in weights if key.endswith(".decoder.bias")]
    named = [key.removeprefix("orig/") for key in saved if key.startswith("orig/")]
    tokens = torch.from_numpy(np.load(folder / "tokens.npy")[: len(saved["orig_logits"])]).long()

    lm = load_lm(shared / "models" / run.partition("-e2e")[0].partition("-local")[0])
    original = lm.original(tokens, at=at, downstream=named)
    spliced = original.splice({position: reference_sae(weights, position) for position in at})
    assert (original.logits() - saved["orig_logits"]).abs().max() <= 1e-4
    assert (spliced.logits() - saved["new_logits"]).abs().max() <= 1e-4
    for position in named:
        assert (original[position] - saved[f"orig/{position}"]).abs().max() <= 1e-4
        assert (spliced[position] - saved[f"in/{position}"]).abs().max() <= 1e-4


def test_someones_own_loop_becomes_end_to_end(capsys: pytest.CaptureFixture[str]) -> None:
    train = runpy.run_path(str(ROOT / "docs" / "own_loop.py"))["train"]
    lm, tokens = load_lm(random_model("gpt2")), random_tokens(batch=32)
    history = train(lm, tokens, position=PRE, downstream=[LATER], steps=40, d_sae=64)
    assert sum(history[-5:]) < 0.5 * sum(history[:5])
    assert "KL" in capsys.readouterr().out


@pytest.mark.shared
def test_the_own_loop_script_runs_on_a_folder_and_a_text(
    shared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, text = shared / "models" / "stories260K", shared / "text" / "tinystories.txt"
    options = ["--steps", "21", "--context", "32", "--downstream", "blocks.4.hook_resid_pre"]
    monkeypatch.setattr(sys, "argv", ["own_loop.py", str(model), str(text), *options])
    runpy.run_path(str(ROOT / "docs" / "own_loop.py"), run_name="__main__")
    lines = [line for line in capsys.readouterr().out.splitlines() if "KL" in line]
    first, last = (float(line.split("KL")[1].split()[0]) for line in lines)
    assert last < first
