"""Values and pure rules of the queue and of the results: states, grants, scheduling, filters, verdicts. No I/O."""
