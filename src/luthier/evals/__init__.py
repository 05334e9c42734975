"""Evaluations: what a model answers, measured."""
