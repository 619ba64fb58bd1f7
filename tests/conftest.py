"""Triton runs interpreted in the tests: on the CPU, for want of a GPU. Set before any kernel is imported."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import quick_interpreter

quick_interpreter.install()
