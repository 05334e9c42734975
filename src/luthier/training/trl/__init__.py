"""The `trl` engine: TRL's own trainers over our tokens, order, checkpoints and events."""
