"""Triton runs interpreted in the tests: on the CPU, for want of a GPU. Set before any kernel is imported.

With TRITON_INTERPRET=0, on a machine with a GPU, `pytest tests -k "triton or cuda"` tests them there (on_gpu.py).
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # threads of two processes on two cores slow each other down many times
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import quick_interpreter
from on_gpu import placed

quick_interpreter.install()


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    with placed(collector.path):  # modules are imported in here
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    with placed(item.path):
        return (yield)
