"""Training: losses as functions of log-probabilities, and the loop over the engines' verbs."""
