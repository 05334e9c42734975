"""Tests of a server as it runs, and of every route at once."""
