"""A lab's own things: users with their tokens, data sets and checkpoints, and the artifacts that hold their bytes."""
