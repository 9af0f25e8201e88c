"""What a lab registers: users with their tokens, data sets, checkpoints, and the artifacts that all of it lies in."""
