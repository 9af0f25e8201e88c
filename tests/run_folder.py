"""The folder of this run of the tests, and the environment of their processes. Imported before Ray and our packages."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

for name in [name for name in os.environ if name.startswith(("UNCANNY_", "RAY_"))]:
    del os.environ[name]
RUN = Path(tempfile.mkdtemp(prefix="u-", dir="/tmp"))  # a short path: those of Unix sockets end at 107 bytes
atexit.register(shutil.rmtree, RUN, ignore_errors=True)
if "PYTEST_XDIST_WORKER" in os.environ:  # each core has a worker: torch's threads would wait for each other's turn
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["XDG_RUNTIME_DIR"] = str(RUN)  # where it is not set, PostgreSQL's wheel warns

from workers.head import driver_environment  # noqa: E402 - the environment comes first

os.environ.update(driver_environment(RUN, local=True))  # Ray reads its environment when it is imported
