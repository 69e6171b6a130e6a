"""The networks of the paper, and trained ones."""
