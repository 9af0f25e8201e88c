"""`uncanny`: the commands."""
