"""A checkpoint of any number of ranks and ZeRO stage goes on on any other, as if nothing had changed."""

import json
import shutil
from pathlib import Path

import forked
import pytest
import torch
from safetensors.torch import load_file

TEACHER = Path(__file__).parents[1] / "recipes/digits_teacher.safetensors"
LAYOUTS = [(ranks, stage) for ranks in (1, 2) for stage in range(4)]
NAMED = [((2, 2), (1, 1)), ((1, 1), (2, 2))]
FEW = [((1, 3), (2, 0)), ((2, 0), (1, 3))]
OTHERS = [(a, b) for a in LAYOUTS for b in LAYOUTS if a != b and (a, b) not in NAMED + FEW]
SAVED, DONE = "000000080", "000000160"  # ten steps, and ten more
BUFFERS = ("noise_const", "resample_filter")  # never trained: they would dilute a relative difference


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("elastic")
    (folder / "recipe.yaml").write_text(forked.RECIPE)
    return folder


def run(workspace: Path, source: tuple[int, int], target: tuple[int, int]) -> Path:
    """Ten steps under `source` (made once), then ten more under `target`; the last checkpoint.

    A rank takes four images at a time, on one rank in two rounds: who trains on half the GPUs doubles the rounds.
    """
    options = ("checkpoint_kimg=0.08", "tick_kimg=0.08")
    first, then = (f"r{ranks}z{stage}" for ranks, stage in (source, target))
    saved = workspace / first / "checkpoints" / SAVED
    if not saved.exists():
        forked.train(workspace, f"run_dir={first}", "kimg=0.08", *split(source), *options, ranks=source[0])
    name = f"{first}-{then}"
    folder = workspace / name / "checkpoints"
    if not folder.exists():
        folder.mkdir(parents=True)
        (folder / SAVED).symlink_to(saved)
        options = ("keep_checkpoints=3", *options)
        said = forked.train(workspace, f"run_dir={name}", "kimg=0.16", *split(target), *options, ranks=target[0])
        assert "resuming at 0.08 kimg" in said
    return folder / DONE


def split(layout: tuple[int, int]) -> tuple[str, str]:
    ranks, stage = layout
    return f"accumulation={2 // ranks}", f"zero_stage={stage}"


def differences(a: Path, b: Path) -> dict[str, float]:
    """‖a − b‖ / ‖b‖ in fp64 over the trained tensors of each network, and over each kind of moments."""
    found = {}
    for part in ("G", "D", "G_ema", "G_adam", "D_adam"):
        first, second = load_file(a / f"{part}.safetensors"), load_file(b / f"{part}.safetensors")
        assert first.keys() == second.keys()
        for kind in ("exp_avg.", "exp_avg_sq.") if part.endswith("adam") else ("",):
            keys = [key for key in second if key.startswith(kind) and not key.endswith(BUFFERS)]
            error = sum((first[key].double() - second[key].double()).square().sum() for key in keys)
            found[f"{part} {kind}"] = float((error / sum(second[key].double().square().sum() for key in keys)) ** 0.5)
    return found


def layout(value: tuple[int, int]) -> str:
    return f"{value[0]} rank{'s' * (value[0] > 1)} ZeRO {value[1]}"


@pytest.mark.parametrize(
    ("source", "target"),
    [*NAMED, *FEW, *(pytest.param(*pair, marks=forked.only_if_all) for pair in OTHERS)],
    ids=layout,
)
def test_ten_more_steps_elsewhere_are_the_same(workspace, source, target):
    """Against the run that stayed: parameters, averages and both moments."""
    moved, stayed = run(workspace, source, target), run(workspace, source, source)
    found = differences(moved, stayed)
    print(f"{layout(source)} → {layout(target)}: {', '.join(f'{part} {value:.1e}' for part, value in found.items())}")
    assert max(found.values()) < 1e-6
    assert min(differences(moved, moved.parent / SAVED).values()) > 1e-5


def test_hsr_may_be_switched_off(workspace):
    """Heads that G did not feel are dropped: all that remains goes on as if they were still there, to the last bit."""
    hsr = f"hsr={{teacher: {TEACHER}, layers: {{8: 3}}, hidden: 8, detach: true}}"
    forked.train(workspace, "run_dir=on", "checkpoint_kimg=0.032", hsr)
    shutil.copytree(workspace / "on", workspace / "off")
    shutil.rmtree(workspace / "off/checkpoints/000000064")
    (workspace / "off/checkpoints/latest").write_text("000000032\n")
    assert '"done": 4' in forked.train(workspace, "run_dir=off", "dry_run=true")
    said = forked.train(workspace, "run_dir=off", "checkpoint_kimg=0.032")
    assert "resuming at 0.032 kimg; HSR is off, so its heads are dropped" in said
    on, off = (workspace / name / "checkpoints/000000064" for name in ("on", "off"))
    for part in ("G", "D", "G_ema", "G_adam", "D_adam"):
        first, second = (load_file(folder / f"{part}.safetensors") for folder in (on, off))
        kept = {key for key in first if "heads." not in key}
        assert second.keys() == kept and (len(kept) < len(first)) == (part in ("G", "G_adam"))
        assert all(torch.equal(first[key], second[key]) for key in kept)
    assert json.loads((off / "state.json").read_text())["recipe"]["hsr"] is None
    assert "resuming at 0.064 kimg\n" in forked.train(workspace, "run_dir=off", "checkpoint_kimg=0.032", "kimg=0.072")
