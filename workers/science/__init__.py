"""The science: torch only, no service, no Ray, no SQL, no HTTP."""
