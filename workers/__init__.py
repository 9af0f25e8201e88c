"""The GPU side: runs tasks. Only the pool, the cluster, the worker and the doctor know Ray."""
