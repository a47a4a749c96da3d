"""The configuration of a training run: e2e_sae's schema, whose YAML files load unchanged, plus optional keys of ours.

Keys, defaults, coercions and validators are those of e2e_sae 2.1.1, so ``lr: 5e-4`` (a string to YAML) is a number and
a misspelt key is an error. Two deliberate differences: relative paths are relative to the current directory, and
``save_dir`` defaults to ``out`` there.

>>> config = Config.model_validate(dict(
...     tlens_model_name="gpt2", save_every_n_samples=None, eval_n_samples=None, batch_size=8, lr="5e-4",
...     loss=dict(sparsity=dict(coeff=1.5), in_to_orig=None, out_to_orig=None, out_to_in=None,
...               logits_kl=dict(coeff=1.0)),
...     n_samples=400_000,
...     train_data=dict(dataset_name="d", tokenizer_name="gpt2", split="train", n_ctx=1024),
...     saes=dict(sae_positions="blocks.6.hook_resid_pre", dict_size_to_input_ratio=60)))
>>> config.lr, config.loss.kind, config.n_gradient_accumulation_steps
(0.0005, 'e2e', 1)
"""

import difflib
import itertools
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    ValidationError,
    model_validator,
)

from e2e_fast.kernels.reference import BANDWIDTH
from e2e_fast.losses import LossConfig, LossName, Positions
from e2e_fast.precision import Precision
from e2e_fast.sae import SAE_OPTIONS, THRESHOLD, Activation, resolve_activation
from e2e_fast.sources import DatasetConfig

Paths = Annotated[tuple[Path, ...] | None, BeforeValidator(lambda v: (v,) if isinstance(v, (str, Path)) else v)]


Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""What torch takes as one."""

EVAL_SEED_OFFSET = 42
"""e2e_sae evaluates on data shuffled with the training seed plus this, unless ``eval_data.seed`` is set."""


class ConfigError(ValueError):
    """A configuration that cannot be run: the message names each key, what was expected and what came."""


class SAEsConfig(BaseModel):
    """Where the SAEs sit and how large they are."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    sae_positions: Positions = Field(min_length=1)
    """TransformerLens hook names, or parts of names that match several positions."""
    dict_size_to_input_ratio: PositiveFloat = 1.0
    """d_sae = int(ratio · d_in)."""
    pretrained_sae_paths: Paths = None
    """Weight files to start from; later files win. Positions they cover stay frozen unless ``retrain_saes``."""
    retrain_saes: bool = False
    k: PositiveInt | None = None
    """TopK and BatchTopK: features kept per token. [ours]"""
    activation: Activation | None = None
    """relu, topk, batch_topk or jump_relu. None: topk with ``k``, else relu, e2e_sae's activation. [ours]"""
    threshold: PositiveFloat = THRESHOLD
    """jump_relu: every feature's before training, in units of the pre-activations. [ours]"""
    bandwidth: PositiveFloat = BANDWIDTH
    """jump_relu: of the straight-through gradients, in units of the pre-activations. [ours]"""
    normalize_decoder: bool = True
    """Decode with unit rows, as e2e_sae does, or with the rows as they are. [ours]"""

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of `e2e_fast.SAE` among them."""
        return {name: getattr(self, name) for name in SAE_OPTIONS}


_NAME, _KEYS = "(a name)", "(its keys)"
_Loss = Annotated[
    Annotated[LossName, Tag(_NAME)] | Annotated[LossConfig, Tag(_KEYS)],
    Discriminator(lambda value: _NAME if isinstance(value, str) else _KEYS),
]


class PhaseConfig(BaseModel):
    """A stretch of training with a loss of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    until: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Where the phase ends, as a share of ``n_samples``. The last phase has none: it ends with the run."""
    loss: _Loss
    """A kind of loss, with the sparsity term (and the downstream positions) of the run's ``loss``; or its five keys."""
    lr: PositiveFloat | None = None
    """The phase's own learning rate, along the run's ``lr_schedule`` over this phase. None: the run's rate goes on."""
    warmup_samples: NonNegativeInt = 0
    """Of a phase with its own ``lr``."""


class SweepConfig(BaseModel):
    """Values to train with side by side: one set of SAEs for each combination, all on the same batches."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    sparsity_coeff: Annotated[tuple[NonNegativeFloat, ...], Field(min_length=1)] | None = None
    """For ``loss.sparsity.coeff``."""
    seed: Annotated[tuple[Seed, ...], Field(min_length=1)] | None = None
    """Of the first weights; the data keep the run's order."""
    k: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] | None = None
    dict_size_to_input_ratio: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] | None = None
    sae_positions: Annotated[tuple[Positions, ...], Field(min_length=1)] | None = None
    """Each a position or a list of them."""
    share_logits: bool = True
    """Form the teacher's logits once for all. All members' activations are alive at a time then, instead of one's."""

    @property
    def values(self) -> dict[str, tuple[Any, ...]]:
        """What is swept: key → values."""
        return {key: values for key, values in self if isinstance(values, tuple)}

    def combinations(self) -> list[dict[str, Any]]:
        """Every combination of the values, the last key varying fastest."""
        swept = self.values
        return [dict(zip(swept, chosen, strict=True)) for chosen in itertools.product(*swept.values())]


class Config(BaseModel):
    """One training run. Sample counts are sequences, never tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    wandb_project: str | None = None
    """None: no wandb."""
    wandb_run_name: str | None = None
    wandb_run_name_prefix: str = ""
    seed: Seed = 0
    tlens_model_name: str | None = None
    """What ``load_lm`` takes: a Hugging Face name, a folder, or ``embedded``. Exactly one of this and the next."""
    tlens_model_path: Path | None = None
    """A folder with the language model, or a weight file that e2e_sae trained with TransformerLens."""
    save_dir: Path | None = Path("out")
    """Run folders are made here. None: nothing is saved."""
    n_samples: PositiveInt | None = None
    """None: until the data ends."""
    save_every_n_samples: PositiveInt | None
    keep_checkpoints: PositiveInt | None = None
    """Weights of the last so many checkpoints stay. None: of all of them, as in e2e_sae. [ours]"""
    eval_every_n_samples: PositiveInt | None = None
    eval_n_samples: PositiveInt | None
    batch_size: PositiveInt
    """Sequences of a forward pass, of each process under torchrun."""
    effective_batch_size: PositiveInt | None = None
    """Sequences of an optimizer step, over all processes; a multiple of ``batch_size`` × processes. None: just that."""
    lr: PositiveFloat
    lr_schedule: Literal["linear", "cosine"] = "cosine"
    min_lr_factor: NonNegativeFloat = 0.1
    warmup_samples: NonNegativeInt = 0
    cooldown_samples: NonNegativeInt = 0
    max_grad_norm: PositiveFloat | None = None
    log_every_n_grad_steps: PositiveInt = 20
    collect_act_frequency_every_n_samples: NonNegativeInt = 20_000
    """0: never."""
    act_frequency_n_tokens: PositiveInt = 100_000
    loss: LossConfig
    schedule: tuple[PhaseConfig, ...] | None = Field(default=None, min_length=1)
    """Phases with losses of their own, one after the other: local, then a short fine-tune on the KL. [ours]"""
    kl_positions: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of a batch's tokens, drawn anew each step, on which training estimates the KL (unbiased). [ours]"""
    sweep: SweepConfig | None = None
    """Several SAEs in one process, which share the language model's passes. [ours]"""
    train_data: DatasetConfig
    eval_data: DatasetConfig | None = None
    saes: SAEsConfig
    lm_processing: Literal["transformer_lens", "none"] = "transformer_lens"
    """Centred writing weights, as every published e2e SAE was trained on, or the raw model. [ours]"""
    precision: Precision | None = None
    """Arithmetic of the matrix products. None: bf16 on CUDA, else fp32. [ours]"""
    compile: bool = False
    """Run the language model's blocks through torch.compile; an error where that is not active. [ours]"""
    cuda_graphs: bool = False
    """Record each micro-step as CUDA graphs and replay them. [ours]"""
    device: str | None = None
    """None: CUDA where there is one, else CPU. [ours]"""

    @model_validator(mode="before")
    @classmethod
    def _drop_deprecated(cls, data: Any) -> Any:
        if isinstance(data, dict) and "collect_output_metrics_every_n_samples" in data:
            data = {k: v for k, v in data.items() if k != "collect_output_metrics_every_n_samples"}
        return data

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.tlens_model_name is None) == (self.tlens_model_path is None):
            raise ValueError("exactly one of tlens_model_name and tlens_model_path must be set")
        if self.effective_batch_size is not None and self.effective_batch_size % self.batch_size:
            raise ValueError(
                f"effective_batch_size must be a multiple of batch_size ({self.batch_size}), "
                f"got {self.effective_batch_size}"
            )
        if self.lr_schedule == "cosine":
            if self.n_samples is None:
                raise ValueError("lr_schedule 'cosine' needs n_samples, got None")
            if self.cooldown_samples:
                raise ValueError(f"lr_schedule 'cosine' needs cooldown_samples 0, got {self.cooldown_samples}")
        if self.n_optimizer_steps == 0:
            step = f"an optimizer step ({self.samples_per_step} sequences)"
            raise ValueError(f"n_samples must be at least {step}, got {self.n_samples}")
        if self.eval_every_n_samples is not None and self.eval_data is None:
            raise ValueError("eval_every_n_samples needs eval_data, got None")
        self._check_schedule(self.schedule or ())
        self._check_sweep()
        self._check_activation()
        return self

    def _check_activation(self) -> None:
        k = self.sweep.k[0] if self.sweep is not None and self.sweep.k else self.saes.k
        try:
            activation = resolve_activation(self.saes.activation, k)
        except ValueError as error:
            raise ValueError(f"saes: {error}") from None
        for loss in (self.loss, *(phase.loss for phase in self.schedule or ())):
            if isinstance(loss, LossConfig) and loss.sparsity.p_norm == 0 and activation != "jump_relu":
                raise ValueError(
                    f"loss.sparsity: p_norm 0 needs saes.activation jump_relu, the L0 of {activation} has no gradient"
                )

    def _check_sweep(self) -> None:
        if self.sweep is None:
            return
        chosen = self.sweep.combinations()
        if chosen == [{}]:
            raise ValueError("sweep needs at least one key with a list of values, got none")
        if len({_label(values) for values in chosen}) < len(chosen):
            raise ValueError(f"sweep: every value may stand once in its list, got {self.sweep.model_dump()}")
        if self.sweep.sparsity_coeff and any(not isinstance(phase.loss, str) for phase in self.schedule or ()):
            raise ValueError("sweep.sparsity_coeff needs the losses of the schedule to be names, got one with keys")

    @property
    def members(self) -> dict[str, "Config"]:
        """The configuration of each set of SAEs, as it would be trained alone: one, under "", without a sweep."""
        if self.sweep is None:
            return {"": self}
        return {_label(chosen): self._member(chosen) for chosen in self.sweep.combinations()}

    def _member(self, chosen: Mapping[str, Any]) -> "Config":
        settings = self.model_dump(exclude={"sweep"})
        settings |= {"wandb_run_name": f"{self.run_name}_{_label(chosen)}", "wandb_run_name_prefix": ""}
        # All members see the same data, in the order that the run's own seed gives.
        for data, seed in (("train_data", self.seed), ("eval_data", self.seed + EVAL_SEED_OFFSET)):
            if settings[data] is not None and settings[data]["seed"] is None:
                settings[data]["seed"] = seed
        for key, value in chosen.items():
            if key == "seed":
                settings["seed"] = value
            elif key == "sparsity_coeff":
                settings["loss"]["sparsity"]["coeff"] = value
            else:
                settings["saes"][key] = value
        return load_config(settings)

    def _check_schedule(self, phases: tuple[PhaseConfig, ...]) -> None:
        if not phases:
            return
        if self.n_samples is None:
            raise ValueError("schedule needs n_samples, got None")
        if (last := phases[-1].until) is not None:
            raise ValueError(f"schedule: the last phase ends with the run and has no until, got {last}")
        ends = [phase.until for phase in phases[:-1]]
        if None in ends:
            raise ValueError(f"schedule: every phase but the last needs until, phase {ends.index(None) + 1} has none")
        starts = self.phase_starts
        if any(a >= b for a, b in zip(starts, [*starts[1:], self.n_optimizer_steps or 0], strict=True)):
            raise ValueError(
                f"schedule: until must grow by at least one optimizer step ({self.samples_per_step} of "
                f"{self.n_samples} samples) from phase to phase, got {ends}"
            )
        for i, phase in enumerate(phases):
            if phase.warmup_samples and phase.lr is None:
                raise ValueError(f"schedule: warmup_samples needs lr, phase {i + 1} has none")

    @property
    def samples_per_step(self) -> int:
        """Sequences of an optimizer step."""
        return self.effective_batch_size or self.batch_size

    @property
    def n_optimizer_steps(self) -> int | None:
        """Optimizer steps of the run; None where the data decides."""
        return self.n_samples // self.samples_per_step if self.n_samples else None

    @property
    def phase_starts(self) -> list[int]:
        """The optimizer step with which each phase begins; [0] without a schedule."""
        return [0, *(round((phase.until or 1) * (self.n_optimizer_steps or 0)) for phase in (self.schedule or ())[:-1])]

    @property
    def n_gradient_accumulation_steps(self) -> int:
        """Micro-batches per optimizer step."""
        return self.samples_per_step // self.batch_size

    @property
    def model(self) -> str:
        """Name or folder of the language model."""
        return str(self.tlens_model_name or self.tlens_model_path)

    @property
    def run_name(self) -> str:
        """``wandb_run_name``, or e2e_sae's name made of the main settings."""
        if self.wandb_run_name:
            return self.wandb_run_name_prefix + self.wandb_run_name
        if self.sweep is not None:
            return f"{self.wandb_run_name_prefix}sweep_{'_'.join(self.sweep.values)}"
        loss = self.loss
        parts = [f"seed-{self.seed}", f"lpcoeff-{loss.sparsity.coeff}"]
        if loss.out_to_in is not None and loss.out_to_in.coeff > 0:
            parts.append(f"in-to-out-{loss.out_to_in.coeff}")
        if loss.logits_kl is not None and loss.logits_kl.coeff > 0:
            parts.append(f"logits-kl-{loss.logits_kl.coeff}")
        if loss.in_to_orig is not None and loss.in_to_orig.total_coeff > 0:
            parts.append(f"in-to-orig-{loss.in_to_orig.total_coeff}")
        parts += [f"lr-{self.lr}", f"ratio-{self.saes.dict_size_to_input_ratio}"]
        parts.append("-".join(self.saes.sae_positions))
        return self.wandb_run_name_prefix + "_".join(parts)

    def replace(self, **changes: Any) -> "Config":
        """A validated copy with some keys changed."""
        return load_config({**self.model_dump(), **changes})


RESUMABLE_WITH = frozenset(
    {
        "wandb_project", "wandb_run_name", "wandb_run_name_prefix", "save_dir", "save_every_n_samples",
        "keep_checkpoints", "eval_every_n_samples", "eval_n_samples", "eval_data", "log_every_n_grad_steps",
        "collect_act_frequency_every_n_samples", "act_frequency_n_tokens", "batch_size", "compile", "cuda_graphs",
        "device",
    }
)  # fmt: skip
"""Keys that may change when a run is resumed: what is saved, logged and measured, and where and in which portions it is
computed. All others decide the weights that the run ends with; ``batch_size`` moves them where a balanced loss,
BatchTopK or ``kl_positions`` looks at a micro-batch as a whole."""


def require_same_run(began: Config, now: Config, folder: Path, given: Collection[str] = ()) -> None:
    """Raises ConfigError, with every difference, unless ``now`` goes on with the run that began in ``folder``.

    ``given``: keys in whose place something else was given (a language model, tokens), which are not compared.
    """

    def decisive(config: Config) -> dict[str, Any]:
        settings = config.model_dump(exclude={*RESUMABLE_WITH, *given}, mode="json")
        return dict(_flat(settings | {"effective_batch_size": config.samples_per_step}))

    before, after = decisive(began), decisive(now)
    changed = [
        f"{key} was {before.get(key)!r}, is {after.get(key)!r}"
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
    ]
    if changed:
        raise ConfigError(
            f"{folder} cannot go on with other settings than it began with: {'; '.join(changed)}. Resume it "
            "with its own final_config.yaml, or start another run from its weights (saes.pretrained_sae_paths)"
        )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def load_config(source: "str | Path | Mapping[str, Any] | Config") -> Config:
    """A configuration from a YAML file, a mapping or a Config.

    Raises ConfigError for unknown, missing or wrong keys and FileNotFoundError for a missing file.
    """
    if isinstance(source, Config):
        return source
    name = "config"
    if isinstance(source, (str, Path)):
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"config must be a YAML file, a mapping or a Config; there is no file {path}")
        name = str(path)
        try:
            source = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{name} is not valid YAML: {error}") from error
    if not isinstance(source, Mapping):
        raise ConfigError(f"{name} must hold a mapping of keys to values, got {type(source).__name__}")
    try:
        return Config.model_validate(dict(source))
    except ValidationError as error:
        raise ConfigError(_explain(name, error)) from error


def _label(chosen: Mapping[str, Any]) -> str:
    """The name of a member of a sweep: ``sparsity_coeff-0.5_seed-1``."""
    return "_".join(f"{key}-{'-'.join(v) if isinstance(v, tuple) else v}" for key, v in chosen.items())


def _explain(name: str, error: ValidationError) -> str:
    lines = [f"{name} cannot be run:"]
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"] if part not in (_NAME, _KEYS)) or "(whole)"
        if problem["type"] == "missing":
            lines.append(f"  {key}: missing; it must be given")
        elif problem["type"] == "extra_forbidden":
            lines.append(f"  {key}: unknown key{_suggest(problem['loc'])}; got {problem['input']!r}")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            got = "" if problem["type"] == "value_error" else f"; got {problem['input']!r}"
            lines.append(f"  {key}: {message}{got}")
    return "\n".join(lines)


def _suggest(location: tuple[int | str, ...]) -> str:
    model: Any = Config
    for part in location[:-1]:
        if part in getattr(model, "model_fields", {}):
            annotation = model.model_fields[part].annotation
            model = next((c for c in _within(annotation) if hasattr(c, "model_fields")), None)
    near = difflib.get_close_matches(str(location[-1]), getattr(model, "model_fields", {}), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _within(annotation: Any) -> Iterator[Any]:
    """An annotation and all that it is made of."""
    yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from _within(part)
