"""Keeping a store in order: upgrades, backups, housekeeping, and a doctor that checks the whole installation."""
