"""The queue and the results: what was asked, what runs, what was measured. No HTTP, no Ray, no torch."""
