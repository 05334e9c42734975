"""The HTTP server: one store of jobs and files, spoken to in several dialects."""
