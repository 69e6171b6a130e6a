"""The paper's appendix A: boxes of objects, their metric, and how many predictions become one."""
