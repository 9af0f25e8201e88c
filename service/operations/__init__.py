"""Keeping a store in order: upgrades, backups, housekeeping, a doctor that checks all; and a load simulated on it."""
