"""The other side of a server: submit a run, follow it, and take its result home."""
