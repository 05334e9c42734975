"""What tests of Luthier and of programs built on it need: the practice model, made by us and shipped."""
