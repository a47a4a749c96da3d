"""Fast end-to-end sparse dictionary learning (Braun et al. 2024)."""

__version__ = "0.1.0"
