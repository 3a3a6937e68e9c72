"""Arms side by side on tasks of the evaluation harness, paired document by document."""
