"""A frozen language model with SAEs at some of its positions.

    logits, acts = model(tokens)          every SAE's output in place of the activation that it read
    logits, raw = model.forward_raw(tokens)                                        the model as it is

>>> from e2e_fast import SAETransformer                                        # doctest: +SKIP
>>> model = SAETransformer.from_local_path("out/my_run")                       # doctest: +SKIP
>>> model.saes["blocks-6-hook_resid_pre"]                                      # doctest: +SKIP
SAE(d_in=768, d_sae=46080)
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from e2e_fast.positions import hyphenated, resolve_positions
from e2e_fast.sae import E2E_SAE_KEYS, SAE, SAE_OPTIONS, SAEActs, load_e2e_sae

if TYPE_CHECKING:
    from e2e_fast.formats import StoredSAE
    from e2e_fast.lm import LM


class CacheActs(NamedTuple):
    """An activation that was only looked at."""

    input: Tensor
    """[..., d] as it arrived."""


class SAETransformer(nn.Module):
    """A frozen language model with SAEs at some of its positions: e2e_sae's class, signature and keys.

    ``tlens_model`` is anything ``load_lm`` takes. ``raw_sae_positions`` are position names or parts of names.
    ``d_sae = int(dict_size_to_input_ratio · d_in)`` at each. ``sae`` holds further arguments of `SAE`: ``k``,
    ``activation``, ``normalize_decoder``, ``threshold``, ``bandwidth``.
    """

    def __init__(
        self,
        tlens_model: Any,
        raw_sae_positions: str | Sequence[str],
        dict_size_to_input_ratio: float = 1.0,
        init_decoder_orthogonal: bool = True,
        *,
        lm_processing: str | None = None,
        **sae: Any,
    ) -> None:
        from e2e_fast.lm import load_lm

        super().__init__()
        self.lm: LM = load_lm(tlens_model, processing=lm_processing)
        self.raw_sae_positions = [raw_sae_positions] if isinstance(raw_sae_positions, str) else list(raw_sae_positions)
        self.all_sae_positions = resolve_positions(self.raw_sae_positions, self.lm.positions())
        init = "e2e_sae" if init_decoder_orthogonal else "empty"
        self.saes = nn.ModuleDict()
        for position in self.all_sae_positions:
            d_in = self.lm.width(position)
            d_sae = int(dict_size_to_input_ratio * d_in)
            if d_sae < 1:
                raise ValueError(
                    f"dict_size_to_input_ratio {dict_size_to_input_ratio} gives no feature at width {d_in}"
                )
            self.saes[hyphenated(position)] = SAE(d_in, d_sae, init=init, **sae)
        self.to(self.lm.device)

    @property
    def by_position(self) -> dict[str, SAE]:
        """The SAEs under their positions' names."""
        saes: dict[str, Any] = {position: self.saes[hyphenated(position)] for position in self.all_sae_positions}
        return saes

    def to(self, *args: Any, **kwargs: Any) -> "SAETransformer":
        """Moves the SAEs and the language model; the model keeps its dtype."""
        super().to(*args, **kwargs)
        device = torch.empty(0).to(*args, **kwargs).device if args or kwargs else None
        if device is not None and (kwargs.get("device") is not None or not isinstance(args[0], torch.dtype)):
            self.lm.to(device)
        return self

    def forward_raw(
        self,
        tokens: Tensor,
        run_entire_model: bool = True,
        final_layer: int | None = None,
        cache_positions: Sequence[str] | None = None,
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Logits [B, T, V] of the untouched model, and its activations at the SAEs' and the cached positions.

        Without ``run_entire_model`` the logits are None and the pass stops behind the last of these positions;
        e2e_sae's ``final_layer`` is accepted and not needed.
        """
        del final_layer
        cached = list(cache_positions or ())
        original = self.lm.original(tokens, at=self.all_sae_positions, downstream=cached, suffix=run_entire_model)
        return original.logits() if run_entire_model else None, dict(original)

    def forward(
        self,
        tokens: Tensor | None,
        sae_positions: str | Sequence[str] | None = "all",
        cache_positions: Sequence[str] | None = None,
        orig_acts: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor | None, dict[str, SAEActs | CacheActs]]:
        """Logits [B, T, V] with the chosen SAEs' outputs in place of the activations, and what each SAE did.

        All chosen SAEs are inserted together: a later one sees the earlier ones' effect. ``cache_positions`` adds the
        activations that arrive there. With ``orig_acts`` (activations by position) only the SAEs run, each on its own
        activation, and the logits are None. Differentiable with respect to the SAEs' weights.
        """
        if sae_positions == "all":
            chosen = self.all_sae_positions
        else:
            chosen = resolve_positions(sae_positions or [], self.all_sae_positions)
        saes = self.by_position
        acts: dict[str, SAEActs | CacheActs] = {}
        if orig_acts is not None:
            return None, {position: saes[position](orig_acts[position]) for position in chosen}
        if tokens is None:
            raise ValueError("tokens must be given unless orig_acts are, got None")
        cached = list(cache_positions or ())
        if not chosen:
            logits, raw = self.forward_raw(tokens, cache_positions=cached)
            return logits, {position: CacheActs(raw[position]) for position in cached}

        def insert(position: str) -> Callable[[Tensor], Tensor]:
            def run(x: Tensor) -> Tensor:
                act = acts[position] = saes[position](x)
                return act.output

            return run

        spliced = self.lm.original(tokens, at=chosen, downstream=cached).splice({p: insert(p) for p in chosen})
        logits = spliced.logits()
        return logits, acts | {position: CacheActs(spliced[position]) for position in cached if position not in acts}

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int = 20,
        sae_positions: str | Sequence[str] | None = "all",
        temperature: float = 1.0,
    ) -> Tensor:
        """[B, T + max_new_tokens]: a continuation sampled with the SAEs inserted; temperature 0 takes the likeliest."""
        for _ in range(max_new_tokens):
            whole, _ = self.forward(tokens[:, -self.lm.n_ctx :], sae_positions)
            assert whole is not None
            logits = whole[:, -1]
            if temperature == 0:
                following = logits.argmax(-1, keepdim=True)
            else:
                following = torch.multinomial((logits / temperature).softmax(-1), 1)
            tokens = torch.cat([tokens, following.to(tokens)], dim=1)
        return tokens

    @classmethod
    def from_local_path(
        cls, checkpoint_dir: str | Path, *, lm: Any = None, checkpoint_file: str | Path | None = None
    ) -> "SAETransformer":
        """The newest weights of a run folder (``final_config.yaml`` + ``samples_N.pt`` or ``.safetensors``), or the SAE
        in a folder or file of another library (`e2e_fast.formats`).

        ``lm`` replaces the model that the configuration names. ``checkpoint_file`` picks one weight file of a run.
        """
        from e2e_fast import formats
        from e2e_fast.checkpoint import read_run

        place, _ = formats.split_name(checkpoint_dir)
        if checkpoint_file is None and place.exists() and not formats.is_run(checkpoint_dir):
            return cls.from_stored(formats.read(checkpoint_dir), lm=lm)
        return cls.from_weights(*read_run(Path(checkpoint_dir), checkpoint_file), lm=lm)

    @classmethod
    def from_wandb(cls, run: str, *, lm: Any = None, cache_dir: str | Path | None = None) -> "SAETransformer":
        """A run ``entity/project/run_id``: downloads its configuration and newest weights (needs wandb)."""
        from e2e_fast.download import wandb_run

        return cls.from_local_path(wandb_run(run, cache_dir), lm=lm)

    @classmethod
    def from_hub(cls, repo: str, *, lm: Any = None, subfolder: str | None = None) -> "SAETransformer":
        """A run folder stored on the Hugging Face hub."""
        from e2e_fast.download import hub_run

        return cls.from_local_path(hub_run(repo, subfolder), lm=lm)

    @classmethod
    def from_stored(
        cls, sae: "StoredSAE", *, lm: Any = None, position: str | None = None, lm_processing: str | None = None
    ) -> "SAETransformer":
        """The SAE of any library's file (`formats.read`) in its language model.

        What is given replaces what the file says: ``lm`` the model, ``position``, ``lm_processing`` ("transformer_lens"
        or "none"). Raises ValueError when one of the three is not known, or the SAE does not fit the model there.
        """
        from e2e_fast.lm import LM, load_lm

        position = position or sae.position
        processing = lm_processing or sae.lm_processing
        if position is None:
            raise ValueError(
                "the file does not say where the SAE sits: give position=, as in 'blocks.6.hook_resid_pre'"
            )
        if lm is None and sae.model is None:
            raise ValueError("the file names no language model: pass lm=")
        if processing is None and not isinstance(lm, LM):
            raise ValueError(
                "the file does not say on which activations the SAE was trained: give lm_processing='transformer_lens' "
                "for TransformerLens' processed (centred) ones, or 'none' for raw ones"
            )
        lm = load_lm(sae.model if lm is None else lm, processing=processing)
        transformer = cls(lm, [lm.check_position(position)], 1.0, init_decoder_orthogonal=False)
        if sae.d_in != lm.width(position):
            raise ValueError(f"the SAE at {position} has d_in {sae.d_in}, {lm.name} has {lm.width(position)} there")
        transformer.saes[hyphenated(position)] = sae.to_sae()
        transformer.saes.to(lm.device)
        return transformer

    @classmethod
    def from_weights(
        cls, settings: Mapping[str, Any], state: Mapping[str, Tensor], *, lm: Any = None
    ) -> "SAETransformer":
        """SAEs from e2e_sae's keys; sizes are read off the tensors, positions off the keys."""
        model = settings.get("tlens_model_name") or settings.get("tlens_model_path")
        if lm is None and model is None:
            raise ValueError("the configuration names no language model (tlens_model_name): pass lm=")
        saes: Mapping[str, Any] = settings.get("saes") or {}
        stems = {key.removesuffix(f".{name}") for key in state for name in E2E_SAE_KEYS if key.endswith(f".{name}")}
        from e2e_fast.lm import load_lm

        lm = load_lm(model if lm is None else lm, processing=settings.get("lm_processing", "transformer_lens"))
        positions = [p for p in lm.positions() if hyphenated(p) in stems]
        if len(positions) != len(stems):
            known = {hyphenated(p) for p in positions}
            raise ValueError(f"the weights hold {sorted(stems - known)[0]!r}, which is no position of {lm.name}")
        options = {name: saes[name] for name in SAE_OPTIONS if name in saes}
        # TopK needs a k below the size, which is not known yet.
        transformer = cls(lm, positions, 1.0, init_decoder_orthogonal=False)
        for position, sae in transformer.by_position.items():
            d_sae, d_in = state[f"{hyphenated(position)}.encoder.0.weight"].shape
            if d_in != sae.d_in:
                raise ValueError(f"the SAE at {position} has d_in {d_in}, {lm.name} has {sae.d_in} there")
            transformer.saes[hyphenated(position)] = SAE(d_in, d_sae, init="empty", **options)
        load_e2e_sae(transformer.by_position, state)
        transformer.saes.to(lm.device)
        return transformer
