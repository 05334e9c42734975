"""A process for each base model: it keeps the model in memory and answers through many adapters."""
