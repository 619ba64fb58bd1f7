"""Triton runs interpreted in the tests: on the CPU, for want of a GPU. Set before any kernel is imported."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # threads of two processes on two cores slow each other down many times
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import quick_interpreter

quick_interpreter.install()
