"""The paper's evaluation, exact counts, the gate."""
