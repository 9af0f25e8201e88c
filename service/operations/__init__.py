"""What keeps a store in order: upgrades, backups, housekeeping, and a doctor that looks at all of it."""
