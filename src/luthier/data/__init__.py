"""From any file to exactly the tokens that will be trained, every row accounted for."""
