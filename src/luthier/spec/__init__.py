"""The run spec: what a person asks for, strict and typed, without any machine-learning package."""
