"""Several runs in one picture: the curves of each, and one line for what cannot be compared."""

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from hsrgan.tools.compare_runs import app, compared, draw


@pytest.fixture
def runs(tmp_path):
    """Two runs of 20 ticks; only the second has loss/r1, every other tick, and a value that was not finite."""
    for name, level in (("a", 1.0), ("b", 3.0)):
        (tmp_path / name).mkdir()
        rows = [{"kimg": i / 2, "images": 500 * i, "seconds": 1, "loss/G": level + i / 10} for i in range(20)]
        if name == "b":
            rows = [row | ({"loss/r1": 0.5} if i % 2 else {}) for i, row in enumerate(rows)]
            rows[3]["loss/G"] = None
            rows.insert(5, {"event": "resume", "kimg": 2.0, "text": "x"})
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "a", tmp_path / "b"


def refused(*arguments) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 2 and "Traceback" not in result.output
    return result.output


def test_curves_of_each_run_and_their_ends(runs, tmp_path):
    out = tmp_path / "compared.png"
    result = CliRunner().invoke(app, [*map(str, runs), "--out", str(out)])
    assert result.exit_code == 0, result.output
    figures = json.loads(out.with_suffix(".json").read_text())
    assert {key: list(of_key) for key, of_key in figures.items()} == {"loss/G": ["a", "b"], "loss/r1": ["b"]}
    assert figures["loss/G"]["a"]["value"] == pytest.approx([1 + i / 10 for i in range(20)])
    assert figures["loss/G"]["b"]["kimg"] == [i / 2 for i in range(20) if i != 3]
    assert figures["loss/G"]["b"]["end"] == pytest.approx(3 + (1.8 + 1.9) / 2)
    assert "loss/r1" in result.output and "–" in result.output
    assert Image.open(out).width > 1000


def test_keys_choose_the_panels_and_every_run_is_drawn(runs, tmp_path):
    curves = compared(runs, ["loss/G"])
    assert list(curves) == ["loss/G"]
    pictures = []
    for shown in ({"loss/G": {"a": curves["loss/G"]["a"]}}, curves):
        draw(shown, tmp_path / "x.png")
        pictures.append(np.asarray(Image.open(tmp_path / "x.png").convert("RGB")).astype(int))
    orange = [((picture - (255, 127, 14)) ** 2).sum(-1).min() for picture in pictures]
    assert orange[1] < 100 < orange[0]
    draw(dict.fromkeys(("x", "y", "z"), curves["loss/G"]), tmp_path / "x.png")
    last = np.asarray(Image.open(tmp_path / "x.png").convert("L"))[-150:-50, 620:1180]
    assert (last == 255).all()  # of four panels the fourth is empty


def test_runs_of_one_name_are_told_apart(runs, tmp_path):
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / "a"
    runs[1].rename(twin)
    assert list(compared([runs[0], twin])["loss/G"]) == [str(runs[0]), str(twin)]


def test_mistakes_get_one_line(runs, tmp_path):
    a, b = runs
    assert "nowhere/log.jsonl is missing" in refused(a, tmp_path / "nowhere", "--out", tmp_path / "x.png")
    assert "loss/x, which no run has logged; there are loss/G, loss/r1" in refused(a, b, "--keys", "loss/G,loss/x")
    assert "a run is given twice" in refused(a, a)
    assert "allowed: a name that ends in .png" in refused(a, "--out", tmp_path / "x.pdf")
    assert not list(tmp_path.glob("x.*"))
