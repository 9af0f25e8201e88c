"""The commands of `uncanny`, a module for each family."""
