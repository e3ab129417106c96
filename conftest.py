"""Tests run in as many processes as there are cores (``-n 0`` for one); each of them computes on one core."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, also by the processes that tests start
