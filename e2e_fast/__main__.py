"""``python -m e2e_fast …`` is ``e2e-fast …``: what torchrun starts."""

from e2e_fast.cli import main

if __name__ == "__main__":
    main()
