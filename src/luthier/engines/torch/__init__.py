"""The `torch` engine: transformers' model with our attention, adapters, loss head and optimizer step."""
