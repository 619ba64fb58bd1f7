"""The tools have one voice: help with examples, one line for a mistake, and `hsrgan TOOL` for each of them."""

import enum
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest
from quickstart_snapshot import save_quickstart
from typer.models import OptionInfo
from typer.testing import CliRunner

from hsrgan.engine import train
from hsrgan.engine.digits import ensure_digits
from hsrgan.tools import cli, score_digits

ROOT = Path(__file__).parents[1]
TOOLS = sorted(cli.tools())
SHARED = {  # an option of this name has these types in every tool
    "seeds": {str}, "seed": {int}, "psi": {float, str}, "cutoff": {int}, "label": {str}, "edit": {str}, "batch": {int},
    "directions": {Path}, "out": {Path}, "w": {Path}, "snapshot": {Path}, "allow_weak": {bool},
}  # fmt: skip


def app(name):
    return importlib.import_module(f"hsrgan.tools.{name}").app


def commands(name) -> dict[str, dict[str, inspect.Parameter]]:
    """The parameters of every command of a tool, by the words that call it; "" is a tool's only one."""
    found = app(name).registered_commands
    if len(found) == 1 and app(name).registered_callback is None:
        return {"": parameters(found[0].callback)}
    return {each.name or each.callback.__name__.replace("_", "-"): parameters(each.callback) for each in found}


def parameters(function) -> dict[str, inspect.Parameter]:
    hints = get_type_hints(function, include_extras=True)
    return {name: p.replace(annotation=hints[name]) for name, p in inspect.signature(function).parameters.items()}


def types(annotation) -> set[type]:
    """Of Annotated[list[str] | None, …]: {str}."""
    if get_origin(annotation) is Annotated:
        return types(get_args(annotation)[0])
    if parts := get_args(annotation):
        return set().union(*map(types, parts)) - {type(None)}
    return {annotation}


def invoke(name, *arguments, **options):
    return CliRunner().invoke(app(name), [str(argument) for argument in arguments], **options)


def test_every_tool_is_found_and_no_module_that_only_helps():
    assert {"sample", "video", "directions", "eval", "pack", "import_weights", "fit_teacher"} <= set(TOOLS)
    assert not {"cli", "options", "pack_sources", "kernel_timing", "__init__"} & set(TOOLS)
    launched = {path.stem for path in (ROOT / "tools").glob("*.py") if 'if __name__ == "__main__"' in path.read_text()}
    assert launched - {"cli"} == set(TOOLS)


@pytest.mark.parametrize("name", TOOLS)
def test_help_shows_an_example_to_copy(name):
    result = invoke(name, "--help", env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    examples = [row.strip() for row in result.output.splitlines()]
    assert any(row.startswith(f"python tools/{name}.py") for row in examples), result.output


@pytest.mark.parametrize("name", TOOLS)
def test_shared_options_mean_the_same(name):
    for words, found in commands(name).items():
        for option, parameter in found.items():
            if option in SHARED:
                assert types(parameter.annotation) <= SHARED[option], f"{name} {words} --{option}"


def of_snapshots():
    """Every command whose first argument is a snapshot."""
    return [
        pytest.param(name, words, found, id=f"{name} {words}".strip())
        for name in TOOLS
        for words, found in commands(name).items()
        if list(found)[:1] in (["snapshot"], ["snapshots"])
    ]


@pytest.mark.parametrize(("name", "words", "found"), of_snapshots())
def test_a_snapshot_that_is_not_there_is_one_line(name, words, found, tmp_path):
    arguments = []
    for option, parameter in found.items():
        if parameter.default is inspect.Parameter.empty:
            kind = types(parameter.annotation).pop()
            value = next(iter(kind)).value if issubclass(kind, enum.Enum) else tmp_path / f"absent-{option}.safetensors"
            is_option = any(isinstance(each, OptionInfo) for each in get_args(parameter.annotation))
            arguments += [f"--{option.replace('_', '-')}", value] if is_option else [value]
    result = invoke(name, *words.split(), *arguments)
    assert result.exit_code == 2 and not isinstance(result.exception, Exception), (result.output, result.exception)
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert "absent-" in result.stderr and not any(tmp_path.iterdir())


def test_hsrgan_lists_the_tools_without_loading_them(tmp_path):
    program = (
        "import sys; from hsrgan.tools import cli; cli.main(['--help']); "
        "print([name for name in ('torch', 'numpy', 'typer', 'hsrgan.tools.sample') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("[]\n")
    listed = [row.split()[0] for row in result.stdout.splitlines() if row and not row.startswith(" ")]
    assert listed[-1 - len(TOOLS) - 1 : -1] == ["train", *TOOLS]
    assert "Score snapshots\n" in result.stdout.replace("  ", "").replace(" \n", "\n")
    assert 'hsrgan = "hsrgan.tools.cli:main"' in (ROOT / "pyproject.toml").read_text()


def called(*arguments, capsys) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        cli.main([str(argument) for argument in arguments])
    return (left.value.code or 0, *capsys.readouterr())


def test_hsrgan_runs_a_tool_and_the_trainer(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hsrgan"])
    snapshot = save_quickstart(tmp_path / "m.safetensors")
    code, said, _ = called("sample", snapshot, "--seeds", "0-1", "--out", tmp_path / "out", capsys=capsys)
    assert code == 0 and "2 pictures" in said and (tmp_path / "out/grid.png").is_file()
    code, said, _ = called("import-weights", "--help", capsys=capsys)
    assert code == 0 and "hsrgan import_weights" in said
    code, said, _ = called("train", "--help", capsys=capsys)
    assert code == 0 and "recipe" in said.lower()
    code, _, wrong = called("train", tmp_path / "no.yaml", capsys=capsys)
    assert code == 2 and wrong.startswith("error: ") and "no.yaml" in wrong
    code, _, wrong = called("smaple", capsys=capsys)
    assert code == 2 and wrong == "error: there is no tool 'smaple': hsrgan --help lists them\n"
    assert called("options", capsys=capsys)[0] == 2
    code, said, _ = called("directions", "sefa", snapshot, "--count", 1, "--samples", 100, "--seeds", 0,
                           "--out", tmp_path / "d.safetensors", capsys=capsys)  # fmt: skip
    made_by = json.loads((tmp_path / "d.json").read_text())["command"]
    assert made_by.startswith(f"python tools/directions.py sefa {snapshot}")


def test_scores_of_a_quickstart_snapshot(tmp_path, monkeypatch):
    """tools/eval.py and tools/score_digits.py; sample, video and directions have files of their own."""
    snapshot = save_quickstart(tmp_path / "m.safetensors")
    shards = ensure_digits(tmp_path, 16, 1)
    result = invoke("eval", snapshot, "--data", shards, "--metrics", "fid64_full", "--workers", 0,
                    "--features", ROOT / "recipes/digits_teacher.safetensors",
                    "--out", tmp_path / "r.jsonl")  # fmt: skip
    assert result.exit_code == 0, (result.output, result.exception)
    scored = json.loads((tmp_path / "r.jsonl").read_text())
    assert scored["metric"] == "fid64_full" and scored["values"]["fid64_full"] > 0 and scored["kimg"] == 160
    real = {"samples": 1797, "sure_share": 0.87, "sure_share_seen": 0.99, "class_shares": [0.1] * 10,
            "nearest_real": 16.4}  # fmt: skip
    monkeypatch.setattr(score_digits, "real_score", lambda: real)  # takes 8 s, and does not depend on the snapshot
    result = invoke("score_digits", snapshot, "--samples", 20, "--json", tmp_path / "score.json")
    assert result.exit_code == 0, (result.output, result.exception)
    assert json.loads((tmp_path / "score.json").read_text())["samples"] == 20


def one_line(result) -> str:
    assert result.exit_code == 2 and not isinstance(result.exception, Exception), (result.output, result.exception)
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and not result.stdout, result.output
    return result.stderr


@pytest.mark.parametrize("name", [*TOOLS, "train"])
def test_an_option_that_there_is_not_is_one_line(name):
    app_of = train.app if name == "train" else app(name)
    for words in ({""} if name == "train" else commands(name)):
        assert "No such option" in one_line(CliRunner().invoke(app_of, [*words.split(), "--no-such-option"]))


@pytest.mark.parametrize(("command", "says"), [
    ("sample x --batch x", ["'--batch'", "valid integer", "'x'"]),
    ("sample x --batch 0", ["'--batch'", "1", "0"]),
    ("sample x --btach 8", ["--btach", "--batch"]),
    ("sample x --batch", ["'--batch' requires an argument"]),
    ("sample x y", ["unexpected extra argument", "y", "sample.py --help"]),
    ("sample", ["Missing argument", "snapshot"]),
    ("export x", ["Missing option '--to'", "onnx", "pt"]),
    ("export x --to no", ["'--to'", "'no' is not one of 'onnx'"]),
    ("directions sfea x", ["No such command 'sfea'", "'sefa'"]),
    ("directions sefa x --count 0", ["'--count'", "1", "0", "directions.py sefa --help"]),
    ("pack x", ["give SOURCE, DEST and --resolution"]),
])  # fmt: skip
def test_what_typer_refuses_is_one_line(command, says):
    name, *arguments = command.split()
    result = invoke(name, *arguments, prog_name=f"{name}.py")
    assert all(text.lower() in one_line(result).lower() for text in says), result.stderr


def test_hsrgan_and_a_script_refuse_in_one_line(capsys):
    for arguments in (["video", "x", "--fps", "0"], ["train", "--no-such-option"], ["pack", "x"]):
        code, said, wrong = called(*arguments, capsys=capsys)
        assert code == 2 and not said and wrong.startswith("error: ") and wrong.count("\n") == 1, wrong
    script = [sys.executable, ROOT / "tools/compare_runs.py", "--no-such-option"]
    result = subprocess.run(script, capture_output=True, text=True)
    assert result.returncode == 2 and not result.stdout and result.stderr.count("\n") == 1, result.stderr
    assert "compare_runs.py --help says more" in result.stderr


@pytest.mark.parametrize("name", ["directions", "import_weights"])
def test_a_tool_of_several_commands_that_is_given_nothing_shows_its_help(name):
    assert "Examples:\n" in (said := invoke(name).output) and "error: " not in said
