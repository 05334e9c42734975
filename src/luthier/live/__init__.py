"""Models that clients train step by step, live: a durable log of commands and one actor for each model."""
