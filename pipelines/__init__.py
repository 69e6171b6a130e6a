"""The chain of the four components, and how to submit it."""
