"""The OpenAI dialect, under `/v1`; `every.py` has all of its routes."""
