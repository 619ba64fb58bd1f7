"""Files of latents: exact round trips, NVIDIA's format, and one line for everything else."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hsrgan.engine.errors import UserError
from hsrgan.engine.latents import FORMAT, Latents, load_latents, save_latents
from hsrgan.engine.model import Generator

W, NOISE = torch.randn(2, 6, 8), torch.randn(2, 656)


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator(z_dim=8, w_dim=8, img_resolution=16, mapping_layers=2, channel_base=64, channel_max=8)


def test_safetensors_keeps_everything_and_npz_keeps_w(tmp_path, generator):
    saved = Latents(W, NOISE, "ab12", "w+")
    for name in ("a.safetensors", "a.npz"):
        save_latents(tmp_path / name, saved)
    whole, w_alone = load_latents(tmp_path / "a.safetensors"), load_latents(tmp_path / "a.npz")
    assert torch.equal(whole.w, W) and torch.equal(whole.noise, NOISE)
    assert (whole.snapshot_sha256, whole.space) == ("ab12", "w+")
    assert torch.equal(w_alone.w, W) and w_alone.noise is w_alone.snapshot_sha256 is w_alone.space is None
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:  # as NVIDIA's generate.py reads it
        assert list(file) == ["w"] and file["w"].dtype == np.float32 and np.array_equal(file["w"], W.numpy())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "a.safetensors"]
    whole.expect(generator, tmp_path)
    w_alone.expect(generator, tmp_path)


def test_nvidias_file_is_read_in_any_precision_and_compressed(tmp_path):
    np.savez_compressed(tmp_path / "projected_w.npz", w=W[:1].double().numpy())
    assert torch.equal(load_latents(tmp_path / "projected_w.npz").w, W[:1])


class _Runs:
    def __reduce__(self):
        return print, ("this must not run",)


def _npz(**arrays):
    return lambda path: np.savez(path, **arrays)


def _tensors(metadata=None, **tensors):
    return lambda path: save_file(tensors, path, {"format": FORMAT, **(metadata or {})})


@pytest.mark.parametrize(
    ("name", "make", "says"),
    [
        ("absent.npz", lambda path: None, "does not exist: give a .safetensors or .npz file"),
        ("absent.safetensors", lambda path: None, "does not exist: give a .safetensors or .npz file"),
        ("w.pt", lambda path: path.write_bytes(b"x"), "must end in .safetensors or .npz"),
        ("text.npz", lambda path: path.write_text("hello"), r"no .npz with an array `w` of numbers \(BadZipFile"),
        ("other.npz", _npz(v=W.numpy()), r"no .npz with an array `w` .*w\.npy"),
        ("pickle.npz", _npz(w=np.array([_Runs()], dtype=object)), "no .npz with an array `w` .*allow_pickle"),
        ("words.npz", _npz(w=np.array(["a"])), "no .npz with an array `w`"),
        ("nan.npz", _npz(w=np.full((1, 6, 8), np.nan)), "no finite numbers"),
        ("flat.npz", _npz(w=np.zeros(8)), r"w is torch.float32 \[8\], not float32 \[N, num_ws"),
        ("empty.npz", _npz(w=np.zeros((0, 6, 8))), r"w is torch.float32 \[0, 6, 8\]"),
        ("text.safetensors", lambda path: path.write_text("hello"), "damaged or no safetensors file"),
        ("bare.safetensors", lambda path: save_file({"w": W}, path), "its format is None, not 'hsrgan-latents-1'"),
        ("none.safetensors", _tensors(noise=NOISE), "holds no latents"),
        ("half.safetensors", _tensors(w=W.half()), "w is torch.float16"),
        ("noise.safetensors", _tensors(w=W, noise=NOISE[:1]), r"noise is torch.float32 \[1, 656\], not float32 \[2, "),
        ("inf.safetensors", _tensors(w=W, noise=NOISE / 0), "no finite numbers"),
    ],
)
def test_other_files_are_one_line(tmp_path, name, make, says, capsys):
    make(tmp_path / name)
    with pytest.raises(UserError, match=says) as caught:
        load_latents(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)
    assert "must not run" not in capsys.readouterr().out


def test_a_bomb_is_refused_before_it_unpacks(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "bomb.npz", w=np.zeros((1000, 6, 8), np.float32))
    monkeypatch.setattr("hsrgan.engine.latents.MOST_BYTES", 100_000)
    with pytest.raises(UserError, match="its w unpacks to 192,128 bytes"):
        load_latents(tmp_path / "bomb.npz")


def test_latents_of_another_model_are_refused(tmp_path, generator):
    with pytest.raises(UserError, match=r"w is \[2, 8, 8\], but the generator takes \[N, 6, 8\]"):
        Latents(torch.zeros(2, 8, 8)).expect(generator, tmp_path)
    with pytest.raises(UserError, match=r"w is \[2, 6, 512\]"):
        Latents(torch.zeros(2, 6, 512)).expect(generator, tmp_path)
    with pytest.raises(UserError, match=r"noise is \[2, 9\], but the generator takes \[N, 656\]"):
        Latents(W, torch.zeros(2, 9)).expect(generator, tmp_path)


def test_a_failed_save_leaves_the_former_file(tmp_path, monkeypatch):
    path = tmp_path / "w.npz"
    save_latents(path, Latents(W))
    before = path.read_bytes()

    def torn(file, **arrays):
        file.write(b"PK")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", torn)
    with pytest.raises(UserError, match=r"cannot write .*w\.npz: No space left"):
        save_latents(path, Latents(W))
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(UserError, match="must end in"):
        save_latents(tmp_path / "w.pt", Latents(W))
