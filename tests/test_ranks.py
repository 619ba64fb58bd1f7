"""What a run of several ranks does where only one of them fails, or sees another file than the rest."""

import contextlib
import os
from functools import partial
from pathlib import Path

import forked
import pytest

from hsrgan.engine import stats
from hsrgan.engine.errors import CannotWrite
from hsrgan.engine.metrics import real_cache

TEACHER = Path(__file__).parents[1] / "recipes" / "digits_teacher.safetensors"
SCORED = ("metrics_kimg=0.032", f"metrics={{names: fid32_full, features: {TEACHER}}}")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "recipe.yaml").write_text(forked.RECIPE)
    return folder


def first() -> bool:
    return os.environ["RANK"] == "0"


def errors(runs: list[forked.Run]) -> list[list[str]]:
    """The lines of each that begin with "error:"; none may hold a traceback."""
    assert not any("Traceback" in run.said for run in runs), "\n".join(run.said for run in runs)
    return [[line for line in run.said.splitlines() if line.startswith("error:")] for run in runs]


@contextlib.contextmanager
def refuse(path: Path):
    raise CannotWrite(f"cannot write {path}: No space left on device")
    yield


def plant_full_cache(cache: str) -> None:
    os.environ["HSRGAN_CACHE"] = cache
    real_cache.written_aside = refuse


def test_a_cache_that_is_full_leaves_the_ranks_in_step(workspace):
    """The first rank alone writes it; the run goes on without the score on every rank."""
    plant = partial(plant_full_cache, str(workspace / "cache"))
    runs = forked.start(workspace, "run_dir=full", "faults.disk_full=continue", *SCORED, ranks=2, plant=plant)
    assert [run.ends(60) for run in runs] == [0, 0], runs[0].said + runs[1].said
    assert runs[0].said.count("goes on without it") == 2
