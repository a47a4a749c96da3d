"""Your own training loop, made end-to-end: the marked lines are all that e2e_fast adds.

    python docs/own_loop.py                         the embedded model and text: nothing to download
    python docs/own_loop.py gpt2 corpus.txt --position blocks.6.hook_resid_pre --downstream blocks.8.hook_resid_pre

The SAE below is nobody's library: swap in yours. Any function from an activation to its reconstruction will do.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import e2e_fast
from e2e_fast.lm import LM


class SAE(nn.Module):
    """x̂ = relu(x W_encᵀ + b_enc) W_dec + b_dec, decoder rows kept at length one."""

    def __init__(self, d_in: int, d_sae: int) -> None:
        super().__init__()
        self.W_dec = nn.Parameter(nn.functional.normalize(torch.randn(d_sae, d_in), dim=-1))
        self.W_enc = nn.Parameter(self.W_dec.detach().clone())
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_in))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (..., d_in) → reconstruction (..., d_in) and code (..., d_sae)."""
        code = torch.relu(nn.functional.linear(x - self.b_dec, self.W_enc, self.b_enc))
        return code @ nn.functional.normalize(self.W_dec, dim=-1) + self.b_dec, code


def train(lm: LM, tokens: Tensor, position: str, downstream: list[str], steps: int, d_sae: int = 512) -> list[float]:
    """Trains on rows of tokens (samples, T) drawn at random; returns the KL of each step, nats per token."""
    torch.manual_seed(0)
    sae = SAE(lm.width(position), d_sae).to(lm.device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3)
    history = []
    for step in range(steps):
        batch = tokens[torch.randint(len(tokens), (8,))]

        original = lm.original(batch, at=position, downstream=downstream, fast=True)  # 1: the model as it is
        x_hat, code = sae(original[position])
        spliced = original.splice(x_hat)  # 2: the model with the reconstruction
        kl = spliced.kl()  # 3: how far its output moved
        loss = kl + sum(spliced.mse(p) for p in downstream)  # 4: (e2e+downstream) and how far later activations moved

        loss = loss + 1e-3 * code.sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(kl.item())
        if step % 20 == 0:
            l0 = (code > 0).float().sum(-1).mean().item()
            print(f"step {step:5d}   KL {history[-1]:.4f} nats/token   L0 {l0:.1f}")
    return history


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="embedded", help="Hugging Face name or folder, with a tokenizer")
    parser.add_argument("text", nargs="?", type=Path, help="text file")
    parser.add_argument("--position", default="blocks.2.hook_resid_pre")
    parser.add_argument("--downstream", nargs="*", default=[])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--context", type=int, default=128)
    args = parser.parse_args()

    lm = e2e_fast.load_lm(args.model)
    if args.text is None:
        tokens = e2e_fast.embedded.tokens("train", n_ctx=args.context, n_samples=500)
    else:
        ids = lm.tokenizer(args.text.read_text(), return_tensors="pt", verbose=False).input_ids[0]
        rows = len(ids) // args.context
        tokens = ids[: rows * args.context].view(rows, args.context)
    train(lm, tokens, args.position, args.downstream, args.steps)


if __name__ == "__main__":
    main()
