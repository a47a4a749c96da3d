"""The bookkeeping of recorded steps, on a CPU with a stand-in for CUDA graphs; and CUDA graphs where there is a GPU."""

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tape
import tiny
import torch
from tiny import AT, LAST, LATER

import e2e_fast
from e2e_fast import cuda_graphs, losses, step
from e2e_fast.cuda_graphs import WARM_UP, StepGraphs
from e2e_fast.lm import LM
from e2e_fast.optimizer import Adam
from e2e_fast.precision import arithmetic
from e2e_fast.sae import SAE, to_e2e_sae

RELU = {"sae_positions": AT, "dict_size_to_input_ratio": 3.0}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.gpt2()


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return tiny.tokens()


@pytest.fixture(autouse=True)
def _only_what_a_gpu_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LM, "check_tokens", lambda self, tokens: None)  # for CPU tensors alone


def settings(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "n_samples": 96,
        "effective_batch_size": None,
        "log_every_n_grad_steps": 2,
        "collect_act_frequency_every_n_samples": 16,
        "act_frequency_n_tokens": 200,
        "loss": losses.e2e_downstream(0.2, (LAST,)).model_dump(),
        "saes": RELU | {"k": 8},
    }
    return tiny.settings(**(base | changes))


def recorded(config: dict[str, Any], model: Any, tokens: np.ndarray) -> tuple[StepGraphs, Any]:
    """A run whose steps are recorded by the stand-in."""
    trainer = e2e_fast.Trainer(config, model, tokens, quiet=True)
    trainer.graphs = StepGraphs([member.saes for member in trainer.members], tape.record)
    return trainer.graphs, trainer.fit()


def assert_equal(ours: Any, theirs: Any) -> None:
    for run, expected in zip(*(r if isinstance(r, list) else [r] for r in (ours, theirs)), strict=True):
        assert run.history == expected.history
        weights = to_e2e_sae(expected.model.by_position)
        for key, value in to_e2e_sae(run.model.by_position).items():
            assert torch.equal(value, weights[key]), key


@pytest.mark.parametrize(
    ("changes", "members"),
    [
        ({}, 1),
        ({"loss": losses.local(0.2).model_dump()}, 1),
        ({"effective_batch_size": 12}, 1),
        ({"kl_positions": 0.4}, 1),
        ({"precision": "bf16"}, 1),
        ({"saes": RELU}, 1),  # dense throughout: half of the features are active
        ({"saes": RELU | {"activation": "jump_relu"}}, 1),
        ({"saes": RELU | {"sae_positions": [AT, LATER]}}, 1),
        ({"sweep": {"seed": [0, 1], "sae_positions": [AT, [AT, LATER]]}, "effective_batch_size": 8}, 4),
    ],
    ids=["topk", "local", "accumulation", "kl rows", "bf16", "relu", "jump_relu", "two positions", "sweep"],
)
def test_recorded_steps_give_the_bits_of_eager_training(
    model: Any, tokens: np.ndarray, changes: dict[str, Any], members: int
) -> None:
    config = settings(**changes)
    graphs, ours = recorded(config, model, tokens)
    assert_equal(ours, e2e_fast.train(config, model, tokens, quiet=True))
    assert graphs.recordings == 1 + members
    # 24 batches; passes and steps warm up together, but before its first step a ReLU code is neither dense nor sparse.
    undecided = 0 if "k" in config["saes"] else 1
    assert graphs.replays == (24 - WARM_UP) + (24 - WARM_UP - undecided) * members


def test_a_change_of_phase_is_recorded_anew_and_a_smaller_last_batch_runs_eagerly(
    model: Any, tokens: np.ndarray
) -> None:
    schedule = [{"until": 0.5, "loss": "local"}, {"until": 0.75, "loss": "balanced"}, {"loss": "e2e"}]
    graphs, ours = recorded(settings(schedule=schedule), model, tokens)
    assert_equal(ours, e2e_fast.train(settings(schedule=schedule), model, tokens, quiet=True))
    # Passes: the prefix, then the whole model. Steps: one a phase.
    assert graphs.recordings == 2 + 3
    assert graphs.replays == (12 - WARM_UP) * 2 + (12 - WARM_UP) + (6 - WARM_UP) * 2

    schedule = [{"until": 0.4, "loss": "local"}, {"until": 0.7, "loss": "balanced"}, {"loss": "local"}]
    graphs, ours = recorded(settings(schedule=schedule), model, tokens)
    assert_equal(ours, e2e_fast.train(settings(schedule=schedule), model, tokens, quiet=True))
    assert graphs.recordings == 3 * 2  # the second local phase reads activations at other addresses

    changes: dict[str, Any] = {"n_samples": None, "lr_schedule": "linear"}
    odd = tokens[:50]  # 12 batches of 4 and one of 2
    graphs, ours = recorded(settings(**changes), model, odd)
    assert_equal(ours, e2e_fast.train(settings(**changes), model, odd, quiet=True))
    assert graphs.replays == (12 - WARM_UP) * 2


def test_what_is_logged_of_a_replay_is_that_steps(model: Any, tokens: np.ndarray) -> None:
    _, ours = recorded(settings(log_every_n_grad_steps=1), model, tokens)
    rows = [row["loss/train/logits_kl"] for row in ours.history[:-1]]
    assert len(set(rows)) == len(rows) == 24


class Driver:
    """Steps of one ReLU SAE, recorded and eager side by side."""

    def __init__(self, model: Any, tokens: np.ndarray, accumulation_steps: int = 2) -> None:
        torch.manual_seed(0)
        self.lm = e2e_fast.load_lm(model)
        self.ours, self.theirs = SAE(32, 96), SAE(32, 96)
        self.theirs.load_state_dict(self.ours.state_dict())
        z = self.lm.original(torch.from_numpy(tokens), at=AT)[AT] @ self.ours.W_enc.detach().T
        self.sixth = float(z.flatten(0, 1).sort(dim=-1, descending=True).values[:, 5].max())
        self.bias(few=True)
        self.graphs = StepGraphs([{AT: self.ours}], tape.record)
        self._batches = iter(torch.from_numpy(tokens).split(4))
        self._accumulation_steps = accumulation_steps

    def bias(self, few: bool) -> None:
        """Encoder biases with which at most 5 features of any token fire, or about half of them."""
        for sae in (self.ours, self.theirs):
            sae.b_enc.data.fill_(-self.sixth if few else 0.0)

    def step(self) -> step.StepResult:
        loss, tokens = losses.e2e(0.3), next(self._batches)
        results = []
        for steps, sae in ((self.graphs, self.ours), (step, self.theirs)):
            original = steps.original_pass(self.lm, [({AT: sae}, loss)], tokens)
            run: Callable[..., step.StepResult] = steps.training_step
            results.append(
                run(self.lm, {AT: sae}, loss, tokens, accumulation_steps=self._accumulation_steps, original=original)
            )
        torch.testing.assert_close(results[0].loss, results[1].loss)
        assert torch.equal(results[0].acts[AT].l0(), results[1].acts[AT].l0())
        for ours, theirs in zip(self.ours.parameters(), self.theirs.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)  # a code with room to spare sums in another order
        return results[0]


def test_sparse_codes_have_a_graph_of_their_own_and_an_overflow_is_repeated_dense(
    model: Any, tokens: np.ndarray
) -> None:
    driver = Driver(model, tokens)
    for sae in (driver.ours, driver.theirs):
        sae.density.limit, sae.density.capacity, sae.density.sparse = 10, 8, True
    fullest = 0
    for _ in range(WARM_UP + 2):
        fullest = int(driver.step().acts[AT].code.count.max())
    assert 3 <= fullest <= 5  # for which 8 slots are right
    assert driver.ours.density.sparse is True
    assert (driver.graphs.recordings, driver.graphs.replays) == (2, 4)

    driver.bias(few=False)  # half of the features fire: more than there is room for
    result = driver.step()
    assert result.acts[AT].is_dense
    assert driver.ours.density.sparse is False
    assert driver.graphs.replays == 6  # the one that overflowed is among them
    for _ in range(WARM_UP + 1):
        driver.step()  # dense and eager, then recorded
    assert (driver.graphs.recordings, driver.graphs.replays) == (3, 6 + (WARM_UP + 1) + 1)

    driver.bias(few=True)  # dense once more, then sparse by the old graph
    driver.step()
    assert driver.ours.density.sparse is True
    result = driver.step()
    assert not result.acts[AT].is_dense
    assert driver.graphs.recordings == 3


def test_a_code_that_outgrows_its_room_gets_more_and_a_graph_for_it(model: Any, tokens: np.ndarray) -> None:
    driver = Driver(model, tokens)
    d_sae = driver.ours.W_dec.shape[0]
    for sae in (driver.ours, driver.theirs):
        sae.density.limit, sae.density.capacity, sae.density.sparse = d_sae, 8, True
    for _ in range(WARM_UP + 1):
        driver.step()
    assert (driver.graphs.recordings, driver.graphs.replays) == (2, 2)
    driver.bias(few=False)
    result = driver.step()  # replayed with 8 slots, then repeated with more
    assert not result.acts[AT].is_dense
    assert driver.graphs.replays == 4
    assert driver.ours.density.capacity >= int(result.acts[AT].code.count.max()) > 8
    for _ in range(WARM_UP + 1):
        driver.step()
    assert (driver.graphs.recordings, driver.graphs.replays) == (3, 4 + (WARM_UP + 1) + 1)


def test_a_single_micro_batch_needs_no_copy_of_the_gradient(model: Any, tokens: np.ndarray) -> None:
    driver = Driver(model, tokens, accumulation_steps=1)
    gradients = []
    for _ in range(WARM_UP + 4):
        driver.step()
        gradients.append(driver.ours.W_enc.grad)
        driver.ours.zero_grad()
        driver.theirs.zero_grad()
    assert gradients[-1] is gradients[-2] is gradients[-3] is not gradients[0]


def test_a_weight_changed_by_hand_is_seen_where_graphs_read_the_optimizers_copies(
    model: Any, tokens: np.ndarray
) -> None:
    driver = Driver(model, tokens, accumulation_steps=1)
    driver.bias(few=False)  # dense throughout
    optimizers = [Adam(s.parameters(), 1e-2, s.shadows.values(), own=True) for s in (driver.ours, driver.theirs)]

    def train() -> None:
        with arithmetic("bf16", "cpu"):
            driver.step()  # compares with an eager step
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    for _ in range(WARM_UP + 2):
        train()
    # Before the first update there are no copies: that situation is another one.
    assert (driver.graphs.recordings, driver.graphs.replays) == (2, 3)
    with torch.no_grad():
        driver.ours.W_enc.neg_()
        driver.theirs.W_enc.neg_()
    train()
    train()
    assert (driver.graphs.recordings, driver.graphs.replays) == (2, 6)  # eager for one step, then the graph again


def test_graphs_are_dropped_all_together(model: Any, tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "KEPT", 1)
    config = settings(schedule=[{"until": 0.5, "loss": "balanced"}, {"loss": "e2e"}])
    living: list[weakref.ref[Any]] = []
    dropped = []

    def record(work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        gc.collect()
        gone = [ref() is None for ref in living]
        if any(gone):
            assert all(gone)
            dropped.append(len(gone))
            living.clear()
        replay, outputs = tape.record(work)
        living.append(weakref.ref(replay.__self__))  # pyright: ignore[reportFunctionMemberAccess]
        return replay, outputs

    trainer = e2e_fast.Trainer(config, model, tokens, quiet=True)
    trainer.graphs = StepGraphs([member.saes for member in trainer.members], record)
    assert_equal(trainer.fit(), e2e_fast.train(config, model, tokens, quiet=True))
    assert dropped == [2]
    assert trainer.graphs.recordings == 4


class Allocator:
    """torch.cuda's graphs as its allocator sees them: a pool is made by its first graph and lost with its last."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device, self.streams, self.users = 0, list[int](), dict[int, int]()
        for name, stand_in in {
            "device": self.on, "Stream": self.stream, "synchronize": lambda: None,
            "CUDAGraph": lambda: Graph(self), "graph": self.capture,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, stand_in)

    @contextlib.contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        before, self.device = self.device, device.index or self.device
        yield
        self.device = before

    def stream(self) -> int:
        return self.device

    @contextlib.contextmanager
    def capture(self, graph: "Graph", pool: int | None, stream: int, capture_error_mode: str) -> Iterator[None]:
        self.streams.append(stream)
        assert pool is None or self.users[pool] > 0, "use_count > 0 INTERNAL ASSERT FAILED"
        graph.number = len(self.users) if pool is None else pool
        self.users[graph.number] = self.users.get(graph.number, 0) + 1
        yield


class Graph:
    def __init__(self, allocator: Allocator) -> None:
        self.allocator, self.number = allocator, -1

    def __del__(self) -> None:
        self.allocator.users[self.number] -= 1

    def pool(self) -> int:
        return self.number

    def replay(self) -> None: ...


def test_graphs_share_a_pool_while_one_of_them_lives_and_are_recorded_on_their_own_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    allocator = Allocator(monkeypatch)
    record = cuda_graphs.CudaRecorder("cuda:1")
    recorded = [record(lambda: 1), record(lambda: 2)]
    assert allocator.users == {0: 2}
    del recorded[0]
    recorded.append(record(lambda: 3))
    assert allocator.users == {0: 2}
    recorded.clear()
    recorded.append(record(lambda: 4))
    assert allocator.users == {0: 0, 1: 1}
    assert allocator.streams == [1] * 4
    assert allocator.device == 0


def test_the_stand_in_refuses_a_step_that_reads_a_value(
    model: Any, tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LM, "check_tokens", lambda self, tokens: int(tokens.max()))
    with pytest.raises(tape.HostRead, match="_local_scalar_dense"):
        recorded(settings(), model, tokens)


def test_the_stand_in_replays_operators_and_no_python() -> None:
    x, calls = torch.ones(2, requires_grad=True), []

    def work() -> torch.Tensor:
        calls.append(1)
        return torch.autograd.grad((x * len(calls)).square().sum(), x)[0]

    replay, out = tape.record(work)
    assert out.isnan().all()
    x.data.fill_(3.0)
    replay()
    assert out.tolist() == [6.0, 6.0]
    assert calls == [1]


def test_what_cannot_be_recorded_is_refused(model: Any, tokens: np.ndarray) -> None:
    with pytest.raises(ValueError, match="cuda_graphs needs an NVIDIA GPU, got device cpu"):
        e2e_fast.Trainer(settings(cuda_graphs=True, device="cpu"), model, tokens, quiet=True)
    with pytest.raises(ValueError, match=r"cannot record activation batch_topk \(at blocks.1"):
        StepGraphs([{AT: SAE(32, 96, k=4, activation="batch_topk")}], tape.record)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # inductor's advice under fp32 and bf16
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need an NVIDIA GPU: torch sees none here")
@pytest.mark.parametrize("compile", [False, True], ids=["", "compile"])
@pytest.mark.parametrize(
    ("changes", "replays"),
    [
        # A second situation warms up too: dense or sparse, and weights with and without the optimizer's copies.
        ({"saes": RELU | {"k": 8}}, 2 * (24 - 2 * WARM_UP)),
        ({"saes": RELU}, 2 * (24 - 2 * WARM_UP)),
        # From the first phase to the second all graphs are dropped, and others recorded.
        ({"schedule": [{"until": 0.5, "loss": "local"}, {"loss": "balanced"}]}, 2 * (12 - 2 * WARM_UP) + 2),
    ],
    ids=["topk", "relu", "schedule"],
)
def test_cuda_graphs_replay_the_numbers_of_eager_training(
    model: Any, tokens: np.ndarray, changes: dict[str, Any], replays: int, compile: bool
) -> None:
    config = settings(device="cuda", effective_batch_size=8, kl_positions=0.5, compile=compile, **changes)
    eager = e2e_fast.train(config, model, tokens, quiet=True)
    trainer = e2e_fast.Trainer(config | {"cuda_graphs": True}, model, tokens, quiet=True)
    ours = trainer.fit()
    assert trainer.graphs is not None
    assert trainer.graphs.recordings >= 2
    assert trainer.graphs.replays >= replays
    for row, expected in zip(ours.history, eager.history, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-3) if "loss" in row else True
