"""What is done with a trained adapter: merged into its base."""
