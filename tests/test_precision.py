"""The plumbing of reduced precision, on a CPU: what is bfloat16, what stays float32, and what is refused."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from watch import Watch

import e2e_fast
from e2e_fast import losses
from e2e_fast.metrics import performance
from e2e_fast.precision import Rounded, arithmetic, resolve
from e2e_fast.step import training_step

AT, LATER = "blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    if request.param == "gpt2":
        config = transformers.GPT2Config(n_layer=3, n_embd=32, n_head=2, n_positions=16, vocab_size=61)
        return transformers.GPT2LMHeadModel(config)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            num_hidden_layers=3, hidden_size=32, intermediate_size=64, num_attention_heads=2,
            max_position_embeddings=16, vocab_size=61,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(61, size=(48, 16))


def settings(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "tlens_model_name": "tiny",
        "save_dir": None,
        "n_samples": 48,
        "save_every_n_samples": None,
        "eval_n_samples": None,
        "batch_size": 4,
        "lr": 1e-3,
        "log_every_n_grad_steps": 1,
        "loss": losses.e2e_downstream(0.2, (LATER,)).model_dump(),
        "train_data": {"dataset_name": "given", "tokenizer_name": "none", "split": "train", "n_ctx": 16},
        "saes": {"sae_positions": AT, "dict_size_to_input_ratio": 3.0},
        "device": "cpu",
    }
    return base | changes


@pytest.mark.parametrize("k", [None, 8], ids=["relu", "topk"])
@pytest.mark.parametrize("loss", [losses.local(0.3), losses.e2e_downstream(0.3, (LATER,)), losses.balanced(0.3)])
def test_products_are_bfloat16_and_all_else_is_float32(
    model: Any, tokens: np.ndarray, k: int | None, loss: losses.LossConfig
) -> None:
    torch.manual_seed(0)
    lm, batch = e2e_fast.load_lm(model), torch.from_numpy(tokens[:8])
    sae: Any = e2e_fast.SAE(32, 96, k=k)
    results, gradients = {}, {}
    for precision in ("fp32", "bf16"):
        sae.zero_grad()
        with arithmetic(precision, "cpu"):
            results[precision] = training_step(lm, {AT: sae}, loss, batch)
        gradients[precision] = {name: p.grad.clone() for name, p in sae.named_parameters()}
    ours, exact = results["bf16"], results["fp32"]
    assert ours.acts[AT].code.values.dtype == torch.bfloat16
    assert exact.acts[AT].code.values.dtype == torch.float32
    for tensor in (ours.original[AT], ours.acts[AT].output, ours.loss, *ours.terms.values()):
        assert tensor.dtype == torch.float32
    if ours.spliced is not None and exact.spliced is not None:
        with arithmetic("bf16", "cpu"):
            measured = performance(ours.original, ours.spliced, batch)
        assert {value.dtype for value in measured.values()} == {torch.float32}
        again = performance(ours.original, ours.spliced, batch)
        assert measured == again  # logits are not rounded: the surrounding autocast changes nothing
        assert ours.spliced.final.dtype == ours.original.final.dtype == torch.float32
    for key, value in ours.terms.items():
        assert float(value) == pytest.approx(float(exact.terms[key]), rel=0.05)
    for name, gradient in gradients["bf16"].items():
        assert gradient.dtype == torch.float32
        error = (gradient - gradients["fp32"][name]).norm() / gradients["fp32"][name].norm()
        assert 0 < error < 0.15, (name, float(error))


@pytest.mark.parametrize("position", [AT, "blocks.1.hook_mlp_out", "blocks.1.mlp.hook_post"])
def test_a_run_in_bfloat16_keeps_float32_weights_and_follows_the_float32_run(
    model: Any, tokens: np.ndarray, position: str
) -> None:
    runs = {}
    for precision in ("fp32", "bf16"):
        saes = {"sae_positions": position, "dict_size_to_input_ratio": 3.0}
        config = settings(precision=precision, saes=saes)
        trainer = e2e_fast.Trainer(config, lm=model, tokens=tokens, quiet=True)
        runs[precision] = trainer.fit()
        assert all(p.dtype == torch.float32 for p in trainer.members[0].parameters.values())
        states = trainer.members[0].optimizer.state.values()
        assert all(state["exp_avg"].dtype == torch.float32 for state in states)
    assert not torch.is_autocast_enabled("cpu")
    for ours, exact in zip(runs["bf16"].history[:-1], runs["fp32"].history[:-1], strict=True):
        assert ours["loss"] != exact["loss"]
        assert ours["loss"] == pytest.approx(exact["loss"], rel=0.05)


def test_the_default_is_float32_on_a_cpu_and_tf32_is_refused_there(model: Any, tokens: np.ndarray) -> None:
    plain, fp32 = (
        e2e_fast.train(settings(precision=precision), lm=model, tokens=tokens, quiet=True)
        for precision in (None, "fp32")
    )
    assert plain.history == fp32.history
    assert resolve(None, "cuda:1") == "bf16"
    with pytest.raises(ValueError, match="tf32 needs an NVIDIA GPU, got device cpu"):
        e2e_fast.train(settings(precision="tf32"), lm=model, tokens=tokens, quiet=True)
    with pytest.raises(e2e_fast.ConfigError, match="precision: Input should be 'fp32', 'tf32' or 'bf16'; got 'fp16'"):
        e2e_fast.load_config(settings(precision="fp16"))


def test_the_processs_own_setting_comes_back() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with arithmetic("fp32", "cpu"):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_frozen_weights_are_rounded_once_and_as_autocast_rounds_them(
    model: Any, tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids: Any = torch.from_numpy(tokens[:4])
    lm = e2e_fast.load_lm(model)

    def run() -> tuple[Tensor, Tensor]:
        with arithmetic("bf16", "cpu"):
            original = lm.original(ids, at=AT)
            x = original[AT].clone().requires_grad_()
            spliced = original.splice(x)
            spliced.final.square().sum().backward()
            assert x.grad is not None
            return original.final, x.grad

    def by_autocast() -> tuple[Tensor, Tensor]:
        with monkeypatch.context() as patch:
            patch.setattr(Rounded, "__call__", lambda self, tensor: tensor)
            return run()

    with torch.inference_mode(), arithmetic("bf16", "cpu"):
        lm.original(ids, at=AT)  # what it makes serves no graph
    for change in (1, 2):
        with torch.no_grad():
            for parameter in lm._modules.parameters():
                parameter *= change
        for ours, expected in zip(run(), by_autocast(), strict=True):
            assert torch.equal(ours, expected)
    weights = {p.data_ptr() for p in lm._modules.parameters()}
    with Watch() as watch:
        run()
    cast = [arguments[0] for arguments in watch.calls["aten::_to_copy"]]
    assert not [t.shape for t in cast if t.data_ptr() in weights]
    with torch.no_grad():
        for parameter in lm._modules.parameters():
            parameter /= 2  # the model's own


def test_a_rounded_copy_is_that_of_the_tensor_as_it_is() -> None:
    weight, rounded = torch.randn(4, 4).add_(1), Rounded()
    with arithmetic("bf16", "cpu"):
        assert rounded(weight) is rounded(weight)
        weight.data = 2 * weight.data
        assert torch.equal(rounded(weight), weight.bfloat16())
        copied, other = copy.deepcopy((rounded, weight))
        while other._version < weight._version:
            other += 1
        assert torch.equal(copied(other), other.bfloat16())
        assert len(pickle.dumps(rounded)) < 100


def test_settings_made_under_torchs_newer_names_come_back_too() -> None:
    products: Any = torch.backends.cuda.matmul
    if not hasattr(products, "fp32_precision"):
        pytest.skip(f"torch {torch.__version__} has the older names alone")
    try:
        products.fp32_precision = "tf32"
        with arithmetic("fp32", "cpu"):
            assert torch.get_float32_matmul_precision() == "highest"
        assert products.fp32_precision == "tf32"
        with pytest.raises(RuntimeError, match="mix of the legacy and new"):
            torch.get_float32_matmul_precision()
    finally:
        torch.set_float32_matmul_precision("highest")
