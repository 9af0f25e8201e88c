"""Runs the tasks, on Ray and on the GPUs.

`pool`, `cluster`, `worker` and `doctor` import Ray; `head` starts a Ray head as a process of its own. `science` needs
neither Ray nor the service.
"""
