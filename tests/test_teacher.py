"""The teacher: which features it gives, that it is frozen, and what it says to wrong files."""

import json

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from hsrgan.engine.errors import UserError
from hsrgan.engine.teacher import Teacher, load_teacher, save_teacher

VIT = "vit_tiny_patch16_224"
SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3}
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


def small_vit(name: str = VIT, **kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    net = timm.create_model(name, **{**SMALL, **kwargs})
    with torch.no_grad():  # norms that do something: the default ones hide a missing norm
        for p in net.parameters():
            if p.ndim == 1:
                p.add_(torch.randn_like(p) * 0.3)
    return net


@pytest.fixture
def vit_file(tmp_path):
    path = tmp_path / "teacher.safetensors"
    save_teacher(path, small_vit(), model=VIT, kwargs=SMALL, input_size=(16, 16), mean=MEAN, std=STD, command="none")
    return path


@pytest.fixture
def img() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def by_hand(net, img, index: int) -> torch.Tensor:
    """Patch tokens of one ViT block after the final norm, step by step."""
    x = F.avg_pool2d((img + 1) / 2, 2)
    x = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    x = net.norm_pre(net._pos_embed(net.patch_embed(x)))
    for block in net.blocks[: index + 1]:
        x = block(x)
    tokens = net.norm(x)[:, net.num_prefix_tokens:]
    return tokens.transpose(1, 2).reshape(len(img), -1, 4, 4)


@pytest.mark.parametrize("registers", [0, 2])
def test_token_features_are_patch_tokens_after_the_final_norm(img, registers):
    net = small_vit(reg_tokens=registers).eval()
    teacher = Teacher(net, {8: 2, 16: 0}, (16, 16), MEAN, STD)
    maps = teacher(img)
    for r, index in {8: 2, 16: 0}.items():
        torch.testing.assert_close(maps[r], by_hand(net, img, index), rtol=1e-4, atol=1e-5)
    assert teacher.channels == {8: 24, 16: 24} and teacher.grids == {8: (4, 4), 16: (4, 4)}


def test_a_norm_kept_behind_the_average_is_applied_to_the_tokens(img):
    net = small_vit(global_pool="avg")
    assert isinstance(net.norm, torch.nn.Identity)
    pooled_norm = net.fc_norm
    maps = Teacher(net, {8: 2}, (16, 16), MEAN, STD)(img)
    net.norm = pooled_norm
    torch.testing.assert_close(maps[8], by_hand(net.eval(), img, 2), rtol=1e-4, atol=1e-5)


def test_convolutional_features_are_stage_maps(img):
    torch.manual_seed(0)
    net = timm.create_model("resnet10t", channels=(8, 16, 24, 32))
    teacher = Teacher(net, {8: 4, 16: 2, 32: 0}, (32, 32), MEAN, STD)
    x = ((img + 1) / 2 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    stem = net.act1(net.bn1(net.conv1(x)))
    stage2 = net.layer2(net.layer1(net.maxpool(stem)))
    maps = teacher(img)
    torch.testing.assert_close(maps[32], stem, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(maps[16], stage2, rtol=1e-4, atol=1e-5)
    assert teacher.channels[8] == 32 and teacher.grids == {8: (1, 1), 16: (4, 4), 32: (16, 16)}


@pytest.mark.parametrize(("name", "kwargs"), [
    ("test_convnext", {}), ("test_efficientnet", {}), ("swin_tiny_patch4_window7_224", {"embed_dim": 12}),
    ("eva02_tiny_patch14_224", {"depth": 2}), ("test_vit", {}), ("regnetx_002", {}),
])
def test_many_families_give_channel_first_maps(name, kwargs):
    net = timm.create_model(name, **kwargs)
    size = tuple(net.pretrained_cfg["input_size"][1:])
    maps = Teacher(net, {8: 1, 16: 0}, size, MEAN, STD)(torch.zeros(1, 3, 16, 16))
    assert all(m.ndim == 4 and m.shape[2] == m.shape[3] <= size[0] and m.isfinite().all() for m in maps.values())


def test_the_file_round_trips_and_is_frozen(vit_file, img):
    teacher = load_teacher(str(vit_file), layers={8: 2, 16: 2}).train()
    assert not any(m.training for m in teacher.modules()) and not any(p.requires_grad for p in teacher.parameters())
    img.requires_grad_()
    maps = teacher(img)
    assert not any(m.requires_grad for m in maps.values())
    torch.testing.assert_close(maps[8], by_hand(small_vit().eval(), img, 2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(maps[8], maps[16], rtol=0, atol=0)


def test_grey_images_are_repeated_and_any_size_is_area_resized(vit_file, img):
    teacher = load_teacher(str(vit_file), layers={8: 1})
    grey = img[:, :1]
    torch.testing.assert_close(teacher(grey)[8], teacher(grey.repeat(1, 3, 1, 1))[8], rtol=1e-5, atol=1e-6)
    small = F.avg_pool2d(grey, 2)
    torch.testing.assert_close(teacher(grey)[8], teacher(small)[8], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(teacher(F.avg_pool2d(small, 2))[8],
                               teacher(F.interpolate(F.avg_pool2d(small, 2), scale_factor=2))[8], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="2 channels"):
        teacher(img[:, :2])


def test_parity_switch_mixes_the_statistics_of_the_released_code(vit_file, img):
    plain = load_teacher(str(vit_file), layers={8: 1})
    parity = load_teacher(str(vit_file), layers={8: 1}, parity_normalize=True)
    mixed = Teacher(small_vit(), {8: 1}, (16, 16), (0.48145466, 0.4578275, 0.40821073), (0.229, 0.224, 0.225))
    torch.testing.assert_close(parity(img)[8], mixed(img)[8])
    assert (parity(img)[8] - plain(img)[8]).abs().max() > 1e-2


def test_layers_after_the_last_wanted_are_not_run(vit_file, img):
    teacher = load_teacher(str(vit_file), layers={8: 0, 16: 1})
    ran = []
    for i, block in enumerate(teacher.net.blocks):
        block.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
    teacher(img)
    assert ran == [0, 1]


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("layers", [{8: 3}, {8: -1}, {}])
def test_layer_out_of_range(vit_file, layers):
    with pytest.raises(UserError, match=r"hsr\.layers") as error:
        load_teacher(str(vit_file), layers=layers)
    assert "counted from 0" in one_line(error)


def test_wrong_names_and_missing_files(tmp_path):
    for name, says in [("vit_tinny_patch16_224", "neither a timm model"), (str(tmp_path / "no.safetensors"), "exist"),
                       (f"{VIT}@big", "size in pixels"), (f"{VIT}@8", "8 px")]:
        with pytest.raises(UserError, match=says) as error:
            load_teacher(name, layers={8: 0}, weights=_weights(tmp_path) if "@8" in name else None)
        one_line(error)
    with pytest.raises(UserError, match="does not exist"):
        load_teacher(VIT, weights=str(tmp_path / "no.pth"), layers={8: 0})


def _weights(folder) -> str:
    path = folder / "weights.safetensors"
    save_file(timm.create_model(VIT).state_dict(), path)
    return str(path)


def _rewrite(path, *, drop=(), metadata=None, **changes):
    """Save the teacher file again with other tensors or metadata."""
    from safetensors import safe_open
    with safe_open(path, "pt") as file:
        kept = dict(file.metadata())
    state = {k: v for k, v in load_file(path).items() if k not in drop} | changes
    save_file(state, path, metadata=kept | (metadata or {}))


@pytest.mark.parametrize(("change", "says"), [
    ({"drop": ["norm.bias"]}, "lacks 1 of .* norm.bias"),
    ({"extra": torch.zeros(1)}, "none of the model's, first extra"),
    ({"cls_token": torch.zeros(1, 1, 5)}, r"cls_token is \[1, 1, 5\] there and \[1, 1, 24\] here"),
    ({"metadata": {"model": "resnet10t", "kwargs": "{}"}}, "not of resnet10t"),
    ({"metadata": {"kwargs": json.dumps({**SMALL, "depth": 4})}}, "lacks .* blocks.3"),
    ({"metadata": {"kwargs": json.dumps({"petch_size": 4})}}, "cannot build"),
    ({"metadata": {"kwargs": json.dumps({"checkpoint_path": "x.pth"})}}, "checkpoint_path"),
    ({"metadata": {"kwargs": "not json"}}, "unreadable metadata"),
    ({"metadata": {"format": "hsrgan-snapshot-1"}}, "no teacher file .*hsrgan-snapshot-1"),
])
def test_teacher_file_of_another_kind(vit_file, change, says):
    _rewrite(vit_file, **change)
    with pytest.raises(UserError, match=says) as error:
        load_teacher(str(vit_file), layers={8: 0})
    one_line(error)


def test_damaged_teacher_file(vit_file):
    vit_file.write_bytes(vit_file.read_bytes()[:5000])
    with pytest.raises(UserError, match="damaged") as error:
        load_teacher(str(vit_file), layers={8: 0})
    one_line(error)


def test_weights_beside_a_file_and_a_weights_file_in_the_wrong_place(vit_file, tmp_path):
    with pytest.raises(UserError, match=r"leave hsr\.weights out"):
        load_teacher(str(vit_file), weights=str(vit_file), layers={8: 0})
    (tmp_path / "dino.pth").write_bytes(b"x")
    with pytest.raises(UserError, match=r"timm name in hsr\.teacher"):
        load_teacher(str(tmp_path / "dino.pth"), layers={8: 0})


@pytest.mark.parametrize("kind", ["safetensors", "pth", "training checkpoint", "without head", "other head"])
def test_weights_file_of_a_timm_name(tmp_path, kind):
    torch.manual_seed(0)
    net = timm.create_model("test_vit").eval()
    state = net.state_dict()
    if kind == "without head":
        state = {k: v for k, v in state.items() if not k.startswith("head.")}
    if kind == "other head":
        state["head.weight"], state["head.bias"] = torch.zeros(3, 64), torch.zeros(3)
    if kind == "pth" or kind == "training checkpoint":
        path = tmp_path / "w.pth"
        torch.save(state if kind == "pth" else
                   {"epoch": 3, "teacher": {f"module.backbone.{k}": v for k, v in state.items()}}, path)
    else:
        path = tmp_path / "w.safetensors"
        save_file(state, path)
    teacher = load_teacher("test_vit", weights=str(path), layers={8: 1})
    cfg = net.pretrained_cfg
    want = Teacher(net, {8: 1}, cfg["input_size"][1:], cfg["mean"], cfg["std"])
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(teacher(x)[8], want(x)[8], rtol=0, atol=0)


def test_weights_file_of_another_architecture(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), path)
    with pytest.raises(UserError, match="not of test_vit"):
        load_teacher("test_vit", weights=str(path), layers={8: 0})


def test_pickled_objects_are_refused(tmp_path):
    path = tmp_path / "w.pth"
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(UserError, match="plain tensors") as error:
        load_teacher("test_vit", weights=str(path), layers={8: 0})
    one_line(error)


def test_input_size_after_the_name(tmp_path):
    teacher = load_teacher(f"{VIT}@96", weights=_weights(tmp_path), layers={8: 0})
    assert teacher.grids == {8: (6, 6)} and teacher.input_size == (96, 96)


BF16 = 2**-8 / 3**0.5  # of one rounding: at most 2⁻⁸, evenly spread


@pytest.mark.parametrize("kind", ["vit", "conv"])
def test_bf16_features_are_those_of_fp32_within_the_format(img, kind, monkeypatch):
    """Roundings in a row add up as the root of their number: three a product (both factors, the result)."""
    attended = []
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, *rest, **kw: attended.append(q.dtype)
                        or fused(q, *rest, **kw))  # fmt: skip
    if kind == "vit":
        teacher, products = Teacher(small_vit(), {8: 2, 16: 0}, (16, 16), MEAN, STD), {8: 13, 16: 5}
    else:
        torch.manual_seed(0)
        teacher = Teacher(timm.create_model("resnet10t"), {8: 3, 16: 1}, (32, 32), MEAN, STD)
        products = {8: 14, 16: 8}
    want = teacher(img)
    attended.clear()
    got = teacher.to_bf16()(img)
    assert set(attended) == ({torch.bfloat16} if kind == "vit" else set())
    for r, expected in want.items():
        error = float((got[r] - expected).norm() / expected.norm())
        assert got[r].dtype == torch.float32 and 0 < error < BF16 * (3 * products[r]) ** 0.5, (r, error)


def test_attention_that_is_not_fused_is_refused(img):
    teacher = Teacher(small_vit(), {8: 2}, (16, 16), MEAN, STD)
    teacher.net.blocks[1].attn.fused_attn = False
    with pytest.raises(UserError, match=r"blocks\.1\.attn.*TIMM_FUSED_ATTN"):
        teacher.to_bf16()
