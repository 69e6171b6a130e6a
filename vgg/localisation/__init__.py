"""The paper's appendix A: where in the image the class is."""
