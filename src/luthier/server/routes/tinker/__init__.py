"""The Tinker dialect, under `/api/v1`."""
