"""Files of weights: safetensors read and written tensor by tensor, adapters in PEFT's format, model cards."""
