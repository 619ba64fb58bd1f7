"""The metrics' networks against the published ones, on real pictures, with random weights that show a wrong resize."""

import math
import warnings
from functools import partial

import metric_fixtures
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from hsrgan.engine.errors import UserError
from hsrgan.engine.metrics import dinov2, resize, vgg16, weights
from hsrgan.engine.metrics.extractor import load_extractor, load_lpips
from hsrgan.engine.metrics.inception import InceptionV3
from hsrgan.engine.metrics.perceptual import LPIPS
from hsrgan.engine.teacher import load_teacher, save_teacher
from hsrgan.engine.tensor_files import sha256_of
from hsrgan.tools.fit_teacher import features as teacher_features

DIGITS_TEACHER = "recipes/digits_teacher.safetensors"


def pictures() -> dict[str, torch.Tensor]:
    """uint8 [n, 3, H, W] by name: below, at, and above 224 and 299, square and not."""
    photo = metric_fixtures.photographs()[1]
    return {
        "digits 8": metric_fixtures.digits(3, 8).expand(-1, 3, -1, -1),
        "crops 64": metric_fixtures.crops(2, 64),
        "crops 299": metric_fixtures.crops(1, 299),
        "crops 400": metric_fixtures.crops(1, 400),
        "photograph 427x640": photo[None],
    }


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """(our cache, the .pth file) of one random Inception."""
    file = metric_fixtures.kaiming_inception(tmp_path_factory.mktemp("inception"))
    return metric_fixtures.imported("inception", file), file


def test_inception_is_torch_fidelitys(inception):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    cache, file = inception
    ours, other_resize = (load_extractor("inception", resize=r, cache=cache) for r in ("tf1", "clean"))
    theirs = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(file))
    for name, images in pictures().items():
        features, logits = ours.features_and_logits(images)
        with torch.no_grad():
            expected, expected_logits = theirs(images)
        assert features.shape == (len(images), ours.dim) and features.dtype == torch.float32
        assert (features - expected).abs().max() < 1e-4 and (logits - expected_logits).abs().max() < 1e-4, name
        if name in ("digits 8", "crops 400"):  # that these weights would show another resize
            assert (other_resize(images) - expected).abs().max() > 1e-2, name


def test_inception_gives_the_same_by_each_of_its_doors(inception):
    ours = load_extractor("inception", cache=inception[0])
    grey = metric_fixtures.digits(2, 16)
    features, logits = ours.features_and_logits(grey)
    assert torch.equal(ours(grey), features) and torch.equal(ours.logits(grey), logits)
    torch.testing.assert_close(ours(grey.expand(-1, 3, -1, -1)), features, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits, features @ ours.net.fc.weight.T)
    assert ours.name == "inception" and ours.protocol == {
        "network": "inception (own weights)",
        "resize": "tf1",
        "weights_sha256": sha256_of(inception[1]),
        "dtype": "float32",
    }


def test_an_extractor_is_frozen_and_exact_whatever_the_process_does(inception):
    ours = load_extractor("inception", cache=inception[0]).train()
    assert not any(m.training for m in ours.modules()) and not any(p.requires_grad for p in ours.parameters())
    images, seen = metric_fixtures.digits(1, 16), []
    plain = ours(images)
    assert not plain.requires_grad
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    ours.net.register_forward_pre_hook(lambda *_: seen.append((matmul.allow_tf32, cudnn.allow_tf32)))
    before = matmul.allow_tf32, cudnn.allow_tf32
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = True
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(ours(images), plain)
        assert seen == [(False, False)] and (matmul.allow_tf32, cudnn.allow_tf32) == (True, True)
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def test_images_that_are_not_bytes_or_have_other_channels_are_refused(inception):
    ours = load_extractor("inception", cache=inception[0])
    with pytest.raises(ValueError, match=r"images are torch\.float32: quantise"):
        ours(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"images are \[1, 2, 8, 8\]"):
        ours(torch.zeros(1, 2, 8, 8, dtype=torch.uint8))


@pytest.fixture(scope="module")
def small_vgg_file(tmp_path_factory):
    """(the .pth file, torchvision's network) of one random VGG-16 whose hidden layers are 24 instead of 4,096 wide."""
    from torchvision.models.vgg import VGG, make_layers

    with torch.device("meta"):
        net = VGG(make_layers([64, 64, "M", 128, 128, "M", *[256] * 3, "M", *[512] * 3, "M", *[512] * 3, "M"]),
                  init_weights=False)  # fmt: skip
        net.classifier[0], net.classifier[3] = torch.nn.Linear(25088, 24), torch.nn.Linear(24, 24)
        net.classifier[6] = torch.nn.Linear(24, 1000)
    net = metric_fixtures.kaiming(net.to_empty(device="cpu")).eval()
    file = tmp_path_factory.mktemp("vgg16") / "vgg16.pth"
    torch.save(net.state_dict(), file)
    return file, net


@pytest.fixture
def small_vgg(small_vgg_file, monkeypatch):
    """(our cache, torchvision's network), with the registry made to expect that small one."""
    monkeypatch.setattr(vgg16, "FEATURES", 24)
    return metric_fixtures.imported("vgg16", small_vgg_file[0]), small_vgg_file[1]


def test_vgg16_is_torchvisions_second_hidden_layer(small_vgg):
    cache, net = small_vgg
    ours = load_extractor("vgg16", cache=cache)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for name, images in pictures().items():
        if name == "crops 299":
            continue
        x = (torch.stack([resize.tf1(image[None], 224)[0] for image in images]) / 255 - mean) / std
        with torch.no_grad():
            expected = net.classifier[:5](net.avgpool(net.features(x)).flatten(1))
        features = ours(images)
        assert features.shape == (len(images), ours.dim) and (features > 0).any()
        assert (features - expected).abs().max() < 1e-4 * expected.abs().max(), name
    assert ours.protocol["resize"] == "tf1" and load_extractor("vgg16", resize="clean", cache=cache).protocol[
        "resize"] == "clean"  # fmt: skip


def test_vgg16_at_full_size_has_torchvisions_keys_and_shapes():
    from torchvision.models import vgg16 as theirs

    with torch.device("meta"):
        expected, ours = theirs().state_dict(), vgg16.VGG16().state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in expected.items()}


def test_lpips_is_the_lpips_packages(small_vgg):
    import lpips

    cache, net = small_vgg
    ours = load_lpips(cache)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of torchvision, at how lpips asks for its trunk
        theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    trunk = {f"net.slice{1 + sum(int(i) > end for end in (3, 8, 15, 22))}.{i}.{kind}": net.state_dict()[key]
             for key in net.state_dict() if key.startswith("features.") for _, i, kind in [key.split(".")]}  # fmt: skip
    missing, unexpected = theirs.load_state_dict(trunk, strict=False)
    assert not unexpected and not any(key.startswith("net.") for key in missing)

    a = metric_fixtures.crops(4, 64)[:, :, :64, :48] / 127.5 - 1
    noise = torch.randn(a.shape, generator=torch.Generator().manual_seed(0))
    for b in (a.flip(0), a + 0.1 * noise, a + 1e-3 * noise):
        with torch.no_grad():
            expected = theirs(a, b).flatten()
        distance = ours.distance(a, b)
        assert distance.shape == (4,) and (expected > 0).all()
        torch.testing.assert_close(distance, expected, rtol=1e-4, atol=1e-9)
    assert ours.distance(a, a).tolist() == [0.0] * 4
    grey = a[:, :1]
    torch.testing.assert_close(ours.distance(grey, -grey), ours.distance(grey.expand_as(a), -grey.expand_as(a)))
    assert ours.protocol["network"] == "lpips-vgg (own weights)" and len(ours.protocol["weights_sha256"].split()) == 2


def test_lpips_refuses_half_precision_and_unequal_batches():
    net, a = LPIPS(), torch.zeros(2, 3, 32, 32)
    with pytest.raises(ValueError, match=r"b is torch\.bfloat16: LPIPS takes float32"):
        net.distance(a, a.bfloat16())
    with pytest.raises(ValueError, match="LPIPS compares image with image"):
        net.distance(a, a[:1])
    with pytest.raises(ValueError, match=r"a is \[2, 2, 32, 32\]"):
        net.distance(a[:, :2], a[:, :2])


def test_positions_are_resampled_as_metas_hub_does():
    table = torch.randn(1, 1 + 37 * 37, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def keys(x: float, a: float = -0.75) -> float:  # PyTorch's kernel without antialias
        x = abs(x)
        return (a + 2) * x**3 - (a + 3) * x**2 + 1 if x <= 1 else a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    along = torch.zeros(16, 37, dtype=torch.float64)
    for i in range(16):
        place = (i + 0.5) * 37 / 16.1 - 0.5
        for j in range(math.floor(place) - 1, math.floor(place) + 3):
            along[i, min(max(j, 0), 36)] += keys(place - j)
    expected = torch.einsum("yi,xj,ijd->yxd", along, along, table[0, 1:].view(37, 37, 3)).reshape(256, 3)
    ours = dinov2.resample_positions(table, 16)
    assert torch.equal(ours[0, 0], table[0, 0]) and (ours[0, 1:] - expected).abs().max() < 1e-9
    timms = timm.layers.resample_abs_pos_embed(table.float(), [16, 16], num_prefix_tokens=1)
    assert (timms[0, 1:] - expected).abs().max() > 0.1  # the difference that this is about


def literal_dinov2(state: dict[str, torch.Tensor], x: torch.Tensor, depth: int, heads: int) -> torch.Tensor:
    """DINOv2 from Meta's keys: patches, positions, pre-norm blocks with layer scale, final norm, class token."""

    def norm(x, key):
        return F.layer_norm(x, x.shape[-1:], state[f"{key}.weight"], state[f"{key}.bias"], eps=1e-6)

    def linear(x, key):
        return x @ state[f"{key}.weight"].T + state[f"{key}.bias"]

    n, width = len(x), state["cls_token"].shape[2]
    patches = F.unfold(x, 14, stride=14).transpose(1, 2) @ state["patch_embed.proj.weight"].flatten(1).T
    tokens = torch.cat([state["cls_token"].expand(n, -1, -1), patches + state["patch_embed.proj.bias"]], 1)
    tokens = tokens + dinov2.resample_positions(state["pos_embed"], 16)
    for i in range(depth):
        q, k, v = linear(norm(tokens, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").chunk(3, 2)
        q, k, v = (t.view(n, -1, heads, width // heads).transpose(1, 2) for t in (q, k, v))
        weight = ((q @ k.transpose(2, 3)) / math.sqrt(width // heads)).softmax(3)
        attended = linear((weight @ v).transpose(1, 2).reshape(n, -1, width), f"blocks.{i}.attn.proj")
        tokens = tokens + attended * state[f"blocks.{i}.ls1.gamma"]
        hidden = linear(norm(tokens, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
        tokens = tokens + linear(hidden, f"blocks.{i}.mlp.fc2") * state[f"blocks.{i}.ls2.gamma"]
    return norm(tokens, "norm")[:, 0]


def test_dinov2_is_metas_read_literally(tmp_path, monkeypatch):
    small = partial(dinov2.DINOv2, width=24, depth=2, heads=3)
    generator = torch.Generator().manual_seed(0)
    state = {k: torch.randn(v.shape, generator=generator) * 0.3 for k, v in small().published_tensors().items()}
    torch.save(state, tmp_path / "dinov2.pth")
    monkeypatch.setattr(dinov2, "DINOv2", small)
    monkeypatch.setattr(dinov2, "FEATURES", 24)
    monkeypatch.setattr(weights, "DINOv2", small)
    ours = load_extractor("dinov2", cache=metric_fixtures.imported("dinov2", tmp_path / "dinov2.pth"))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for name, images in pictures().items():
        x = F.interpolate(images.float() / 255, size=(224, 224), mode="bicubic", antialias=True)
        x = (x - mean) / std
        expected = literal_dinov2(state, x, depth=2, heads=3)
        assert (ours(images) - expected).abs().max() < 1e-5, name
        clamped = literal_dinov2(state, (x * std + mean).clamp(0, 1).sub(mean).div(std), depth=2, heads=3)
        if name == "digits 8":
            assert (clamped - expected).abs().max() > 1e-4  # that a clamp would show
    assert ours.protocol["resize"] == "bicubic" and ours.dim == 24


def test_dinov2_at_full_size_is_vit_l_14_by_metas_keys():
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in dinov2.DINOv2().published_tensors().items()}
    block = {
        "norm1.weight": (1024,), "norm1.bias": (1024,), "attn.qkv.weight": (3072, 1024), "attn.qkv.bias": (3072,),
        "attn.proj.weight": (1024, 1024), "attn.proj.bias": (1024,), "ls1.gamma": (1024,), "norm2.weight": (1024,),
        "norm2.bias": (1024,), "mlp.fc1.weight": (4096, 1024), "mlp.fc1.bias": (4096,), "mlp.fc2.weight": (1024, 4096),
        "mlp.fc2.bias": (1024,), "ls2.gamma": (1024,),
    }  # fmt: skip
    assert shapes == {
        "cls_token": (1, 1, 1024), "pos_embed": (1, 1370, 1024), "mask_token": (1, 1024),
        "patch_embed.proj.weight": (1024, 3, 14, 14), "patch_embed.proj.bias": (1024,),
        "norm.weight": (1024,), "norm.bias": (1024,),
        **{f"blocks.{i}.{k}": v for i in range(24) for k, v in block.items()},
    }  # fmt: skip


@pytest.mark.parametrize("model", ["test_vit", "test_resnet", "test_efficientnet"])
def test_a_timm_backbone_gives_its_pooled_features(tmp_path, model):
    torch.manual_seed(0)
    net = timm.create_model(model)
    metric_fixtures.kaiming(net)
    file = tmp_path / "w.safetensors"
    save_file(net.state_dict(), file)
    ours = load_extractor(f"timm:{model}:{file}")
    cfg, images = net.pretrained_cfg, metric_fixtures.crops(2, 200)
    mean, std = (torch.tensor(cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    x = F.interpolate(images.float() / 255, size=cfg["input_size"][1:], mode="bicubic", antialias=True)
    with torch.no_grad():
        net.reset_classifier(0)
        expected = net.eval()((x - mean) / std)
    assert ours(images).shape == (2, ours.dim) and ours.name == f"timm:{model}"
    torch.testing.assert_close(ours(images), expected, rtol=1e-4, atol=1e-4)
    assert ours.protocol["weights_sha256"] == sha256_of(file)
    assert torch.isfinite(ours(metric_fixtures.digits(1, 8))).all()


def test_the_quickstarts_teacher_scores_the_quickstart():
    ours = load_extractor(DIGITS_TEACHER)
    images = metric_fixtures.digits(40, 16)
    expected = teacher_features(load_teacher(DIGITS_TEACHER, layers={16: 3}), images / 255)
    torch.testing.assert_close(ours(images), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(images.expand(-1, 3, -1, -1)), expected, rtol=1e-5, atol=1e-5)
    assert (ours.dim, ours.name, ours.protocol["resize"]) == (64, "teacher", "area")


def test_a_convolutional_teacher_gives_the_mean_of_its_last_map(tmp_path):
    file, statistics = tmp_path / "teacher.safetensors", {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    net = metric_fixtures.kaiming(timm.create_model("resnet10t", channels=(8, 16, 24, 32)))
    save_teacher(file, net, model="resnet10t", kwargs={"channels": [8, 16, 24, 32]}, input_size=(32, 32),
                 command="none", **statistics)  # fmt: skip
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in statistics.values())
    images = metric_fixtures.crops(2, 64)
    with torch.no_grad():
        expected = net.eval().forward_features((F.avg_pool2d(images / 255, 2) - mean) / std).mean((2, 3))
    torch.testing.assert_close(load_extractor(str(file))(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("spec", "says"), [
    ("resnet", "inception, vgg16, dinov2, timm:MODEL:FILE"), ("timm:resnet50", "write timm:MODEL:FILE"),
    ("timm:resnet49:x.pth", "neither a timm model"), ("timm:test_vit:absent.pth", "absent.pth does not exist"),
    ("absent.safetensors", "absent.safetensors does not exist"),
])  # fmt: skip
def test_a_spec_of_nothing_is_one_line(spec, says):
    with pytest.raises(UserError, match=says) as error:
        load_extractor(spec)
    assert "\n" not in str(error.value)


def test_a_resize_that_nobody_publishes_is_refused():
    with pytest.raises(UserError, match=r"resize 'lanczos': tf1 .* or clean"):
        load_extractor("inception", resize="lanczos")


def test_real_pictures_of_many_sizes():
    batches = metric_fixtures.pictures_of_many_sizes(50)
    assert [tuple(b.shape) for b in batches] == [(10, 3, s, s) for s in (16, 32, 64, 160, 320)]
    assert all(b.dtype == torch.uint8 and b.float().std() > 20 for b in batches)
    assert all(len({image.numpy().tobytes() for image in b}) == 10 for b in batches)


def test_inception_has_the_published_number_of_values():
    """23.85 M: what fits the published file's 95.6 MB in fp32."""
    with torch.device("meta"):
        tensors = InceptionV3().state_dict()
    size = sum(4 * v.numel() for v in tensors.values())
    assert 0 < weights.PUBLISHED["inception"].size - size < 200_000
