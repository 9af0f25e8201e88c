"""The patterns of a lab's own names, of ids, of digests and of texts."""

import re

OWN_DATASET = "npz:"  # `workers/science/datasets/npz.py` has it too: `tests/contract/test_catalog.py` compares them
REGISTERED = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
REGISTERED_RULE = "letters, digits, `_`, `.` and `-`, at most 100"
ID = re.compile("[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
DIGEST = re.compile("[0-9a-f]{64}")
DIGEST_PATTERN = f"^{DIGEST.pattern}$"
TEXT_PATTERN = r"^[^\x00]*$"
UNSTORABLE = re.compile("[\x00\ud800-\udfff]")  # in any text: databases take none of these characters
