"""The real clients of other systems, each in a clean environment of its own, against a server of ours."""
