"""The queue and the results: what was asked, what runs, what was measured. No HTTP, no Ray, no torch.

Rooms one above the other: `operations`, `queue`, `results`, `lab`, `store`, `specs`, `model`. Each knows lower ones.
"""
