"""freeze: what it names keeps every bit, whatever the ZeRO stage and over resumes, and the rest trains."""

import json
import shutil
from pathlib import Path

import forked
import pytest
import torch
from safetensors.torch import load_file
from test_checkpoints import assert_bitwise, newest
from test_graphs import CPU, recipe
from transfer_networks import networks

from hsrgan.engine.config import load_recipe
from hsrgan.engine.errors import UserError
from hsrgan.engine.freezing import check_known, discriminator_layers, frozen_parameters
from hsrgan.engine.phases import build_phases, rounds
from hsrgan.engine.sections import Freeze
from hsrgan.tools.plain_training import plain_training

LAYERS = {  # as --freezed counts them: arXiv 2002.10964's layers from the image on, fromrgb and skip each one
    "orig": ["b16.fromrgb", "b16.conv0", "b16.conv1", "b8.conv0", "b8.conv1"],
    "resnet": ["b16.fromrgb", "b16.conv0", "b16.conv1", "b16.skip", "b8.conv0", "b8.conv1", "b8.skip"],
    "skip": ["b16.fromrgb", "b16.conv0", "b16.conv1", "b8.fromrgb", "b8.conv0", "b8.conv1"],
}


@pytest.mark.parametrize("architecture", LAYERS)
def test_freeze_d_counts_layers_from_the_image_on(tmp_path, architecture):
    layers = LAYERS[architecture]
    nets = networks(0, architecture=architecture)
    assert discriminator_layers(nets["D"]) == layers
    parameters = [name for name, _ in nets["D"].named_parameters()]
    for d in range(len(layers) + 1):
        frozen = frozen_parameters(Freeze(d=d), nets["G"], nets["D"])
        held = {name for name in parameters if name.rpartition(".")[0] in layers[:d]}
        assert frozen == {"G": frozenset(), "D": held}
    text = forked.RECIPE.replace("discriminator: {", f"discriminator: {{architecture: {architecture}, ")
    (tmp_path / "r.yaml").write_text(text)
    assert load_recipe(tmp_path / "r.yaml", [f"freeze.d={len(layers)}"]).freeze.d == len(layers)
    with pytest.raises(UserError, match=f"allowed for this discriminator: 0 to {len(layers)}, its layers above 4×4"):
        load_recipe(tmp_path / "r.yaml", [f"freeze.d={len(layers) + 1}"])


def test_what_mapping_and_names_freeze():
    nets = networks(0, heads=(8,), c_dim=2)
    mapping = {f"generator.mapping.{n}.{p}" for n in ("embed", "fc0", "fc1") for p in ("weight", "bias")}
    assert frozen_parameters(Freeze(mapping=True), nets["G"], nets["D"])["G"] == mapping
    names = ["G.synthesis.b?.torgb.bias", "G.heads.8.*.bias", "D.b4.out.weight"]
    assert frozen_parameters(Freeze(names=names), nets["G"], nets["D"]) == {
        "G": {"generator.synthesis.b4.torgb.bias", "generator.synthesis.b8.torgb.bias",
              "heads.heads.8.conv1x1_1.bias", "heads.heads.8.conv1x1_2.bias"},
        "D": {"b4.out.weight"},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (Freeze(names=["G.maping.fc0.weight"]), "'G.maping.fc0.weight' matches no parameter of G or D; did you mean "
         "G.mapping.fc0.weight or "),
        (Freeze(names=["b16.*"]), "'b16.*' matches no parameter of G or D"),
        (Freeze(names=["D.*"]), "freeze leaves nothing of the discriminator to train"),
        (Freeze(mapping=True, names=["G.synthesis.*"]), "freeze leaves nothing of the generator to train"),
    ],
)  # fmt: skip
def test_names_of_nothing_and_of_everything_are_refused(freeze, message):
    nets = networks(0, heads=(8,))
    with pytest.raises(UserError) as error:
        frozen_parameters(freeze, nets["G"], nets["D"])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_nothing_is_held_at_untrained_values():
    frozen = {"G": frozenset({"generator.mapping.fc0.weight"}), "D": frozenset({"b16.skip.weight", "b8.skip.weight"})}
    check_known(frozen, {"G": {"mapping.fc1.weight"}, "D": set()})
    check_known({"G": frozenset(), "D": frozenset()}, None)
    with pytest.raises(UserError, match=r"hold D\.b16\.skip\.weight at untrained values, since init_from does not"):
        check_known(frozen, {"G": set(), "D": {"b16.skip.weight"}})
    with pytest.raises(UserError, match=r"G\.mapping\.fc0\.weight and 2 more at .*, since the recipe has no init_from"):
        check_known(frozen, None)


FREEZE = "freeze={d: 4, mapping: true, names: [D.b4.out.*, G.synthesis.b4.const]}"


def held(part: str, name: str) -> bool:
    """Whether that freezes it, of the networks of forked.RECIPE, by the names in a checkpoint."""
    if part == "D":
        return name.startswith(("b16.fromrgb.", "b16.conv0.", "b16.conv1.", "b16.skip.", "b4.out."))
    return name.startswith("generator.mapping.fc0.") or "mapping.embed" in name or name.endswith("b4.const")


@pytest.mark.parametrize("phase_name", ["Gmain", "Greg", "Dmain", "Dreg"])
def test_a_frozen_parameter_is_not_differentiated_and_the_others_are_as_ever(phase_name):
    gradients = []
    for freeze in (Freeze(), Freeze(d=4, mapping=True, names=["D.b4.out.*", "G.synthesis.b4.const"])):
        t = plain_training(recipe(hsr=None), CPU, {})
        t.frozen = frozen_parameters(freeze, t.g.module, t.d.module)
        phase = next(p for p in build_phases(t) if p.name == phase_name)
        net, other = (t.g, t.d) if phase.network == "G" else (t.d, t.g)
        other.module.requires_grad_(False)
        torch.manual_seed(1)
        (batch,) = rounds(phase, t, 0, torch.randn(8, 1, 16, 16), torch.zeros(8, 0))
        names = [name for name, _ in net.module.named_parameters()]
        gradients.append(dict(zip(names, phase.gradients(batch)[0], strict=True)))
        assert all(p.requires_grad for p in net.module.parameters())  # its own again
    free, frozen = gradients
    names = t.frozen[phase.network]
    assert len(names) >= 5 and all(frozen[name] is None for name in names)
    assert sum(free[name] is not None for name in names) >= len(names) - 1  # R1 has no part in D's last bias
    for name in free.keys() - names:
        assert (free[name] is None) == (frozen[name] is None)
        assert free[name] is None or torch.equal(free[name], frozen[name]), name


# Whole runs


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("freezing")
    (folder / "recipe.yaml").write_text(forked.RECIPE)
    return folder


@pytest.fixture(scope="module")
def source(workspace) -> Path:
    """The last checkpoint of a run."""
    forked.train(workspace, "run_dir=source", "adam.beta1=0.5")
    return workspace / "source" / "checkpoints" / newest(workspace / "source")


def parameters(checkpoint: Path, part: str) -> dict[str, torch.Tensor]:
    kept = load_file(checkpoint / f"{part}.safetensors")
    return {k: v for k, v in kept.items() if not k.endswith(("resample_filter", "noise_const", "w_avg"))}


def last(run: Path) -> Path:
    return run / "checkpoints" / newest(run)


def assert_frozen(run: Path, since: Path) -> None:
    for part in ("G", "D"):
        now, then = parameters(last(run), part), parameters(since, part)
        assert any(held(part, name) for name in now)
        for name, value in now.items():
            assert torch.equal(value, then[name]) == held(part, name), f"{part} {name}"


@pytest.fixture(scope="module")
def straight(workspace, source) -> Path:
    said = forked.train(workspace, "run_dir=straight", f"init_from={source}", FREEZE)
    assert "loaded" in said and "begin anew" in said
    return workspace / "straight"


def test_frozen_parameters_keep_every_bit_and_the_others_move(straight, source):
    assert_frozen(straight, source)
    for part in ("G", "D"):
        moments = load_file(last(straight) / f"{part}_adam.safetensors")
        for key, value in moments.items():
            assert not (held(part, key.partition(".")[2]) and value.any()), key
    report = json.loads((straight / "transfer.json").read_text())
    assert {row["what"] for row in report["tensors"]} == {"loaded"}
    state = json.loads((last(straight) / "state.json").read_text())
    assert state["images"] == 64 and state["class_names"] == [str(i) for i in range(10)]


@pytest.mark.parametrize("stage", [2, 3])
def test_frozen_parameters_keep_every_bit_when_sharded(workspace, source, stage):
    options = (f"run_dir=stage{stage}", f"zero_stage={stage}", "kimg=0.032", "adam.beta1=0.5", "checkpoint_kimg=1")
    forked.train(workspace, *options, f"init_from={source}", FREEZE, ranks=2)
    assert_frozen(workspace / f"stage{stage}", source)


def test_a_frozen_run_resumes_to_the_last_bit(workspace, source, straight):
    for kimg in (0.032, 0.064):
        forked.train(workspace, "run_dir=resumed", f"init_from={source}", FREEZE, f"kimg={kimg}")
    for state in (last(workspace / name) / "state.json" for name in ("resumed", "straight")):
        assert json.loads(state.read_text())["adam_steps"] == {"G": 12, "D": 12}
    assert_bitwise(workspace / "resumed", straight)


def test_freeze_may_change_on_resuming(workspace, source):
    """Momentum from before would move what is frozen; a variance that had died down would fling what is set free."""
    run = workspace / "changed"
    shutil.copytree(source.parent.parent, run)
    options = ("run_dir=changed", "adam.beta1=0.5", "checkpoint_kimg=1")
    said = forked.train(workspace, *options, "kimg=0.096", "freeze.mapping=true")
    assert "resuming at 0.064 kimg; freeze has changed, so Adam begins anew for G\n" in said
    since, now = parameters(source, "G"), parameters(last(run), "G")
    for name, value in now.items():
        assert torch.equal(value, since[name]) == ("mapping" in name), name
    steps = json.loads((last(run) / "state.json").read_text())["adam_steps"]
    assert steps == {"G": 6, "D": 18}  # of four steps, and of twelve
    said = forked.train(workspace, *options, "kimg=0.104")
    assert "Adam begins anew for G\n" in said
    moved = {name: (value - now[name]).abs().max() for name, value in parameters(last(run), "G").items()}
    step = 0.002 * 2 / 3  # two updates of one, Gmain and Greg
    assert all(0 < moved[name] < 2.1 * step for name in moved if "mapping" in name), moved
    said = forked.train(workspace, *options, "kimg=0.112")
    assert "freeze has changed" not in said and "resuming at 0.104 kimg" in said


def refused(workspace: Path, run: str, *overrides: str) -> str:
    (process,) = forked.start(workspace, f"run_dir={run}", *overrides)
    assert process.ends() == 2, process.said
    errors = [line for line in process.said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in process.said
    assert [path.name for path in (workspace / run).iterdir()] == ["held"]  # by the process that has ended
    return errors[0]


def test_refusals_leave_nothing_behind(workspace, source):
    assert "since the recipe has no init_from" in refused(workspace, "none", "freeze.mapping=true")
    line = refused(workspace, "none", f"init_from={source}", "freeze.mapping=true", "generator.channel_base=128",
                   "freeze.names=[G.synthesis.b16.conv1.bias]")  # fmt: skip
    assert "hold G.synthesis.b16.conv1.bias at untrained values, since init_from does not bring them" in line
    assert "generator.w_dim" not in line


def test_a_snapshot_starts_a_run_of_another_shape(workspace, source):
    """16×16 with labels → 32×32 without, twice as wide: a run to its end from the averaged G alone."""
    snapshot = source.parent.parent / "snapshots" / f"{source.name}.safetensors"
    options = ("data.resolution=32", "data.labels=false", "generator.channel_base=128", "kimg=0.016", "batch=8")
    said = forked.train(workspace, "run_dir=branch", f"init_from={snapshot}", "checkpoint_kimg=1", *options)
    assert all(word in said for word in ("partly", "dropped", "new"))
    report = json.loads((workspace / "branch" / "transfer.json").read_text())
    kinds = {(row["network"], row["what"]) for row in report["tensors"]}
    assert ("D", "new") in kinds and ("D", "loaded") not in kinds
    assert {("G", what) for what in ("loaded", "partly", "new", "dropped")} <= kinds
    key = "synthesis.b8.conv1.weight"  # N(0, 1), and two steps away from where it came from
    moved = load_file(last(workspace / "branch") / "G_ema.safetensors")[key] - load_file(snapshot)[key]
    assert 0 < moved.abs().max() < 0.01
