"""The Synth dialect, under `/api` and `/api/v1`; `every.py` has all of its routes."""
