"""Luthier fine-tunes open-weight language models and proves what it did."""

__version__ = "0.1.0"
