"""Models and data for practice and tests, small enough to ship."""
