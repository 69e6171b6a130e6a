"""The paper's tables: from finished evaluations, and the runs that they need."""
