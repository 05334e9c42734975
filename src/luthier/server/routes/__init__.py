"""Routes by dialect; each module has a `router`."""
