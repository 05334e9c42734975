"""The `mlx` engine: models and quantiser by mlx_lm, the same verbs, losses and proofs as every engine."""
