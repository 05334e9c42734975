"""Engines: the things that train, each of them five verbs."""
