"""The GPU side: runs tasks. Only `pool.py` and `worker.py` know Ray."""
