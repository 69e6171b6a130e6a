"""Other people's weights as checkpoints, and checkpoints as files for other software."""
