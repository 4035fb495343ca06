"""The encoder against torchvision's and timm's own networks; what is frozen stays so; weights that do not fit."""

from __future__ import annotations

import copy
import math
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from capdist.errors import CapdistError, CheckpointError, StorageError, UsageError
from capdist.models.encoder import Backbone, Encoder, build_backbone, read_state_dict


def _photos(side: int = 64, count: int = 2) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(3))


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """Make a network with random weights, and BatchNorm statistics that are not the initial zeros and ones."""
    torch.manual_seed(0)
    network = make()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network.eval()


def _save(network: nn.Module, path: Path) -> str:
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, path)
    else:
        torch.save(network.state_dict(), path)
    return str(path)


def _cells(feature_map: Tensor) -> Tensor:
    """Flatten a map to cells, row by row, the slow way."""
    _, _, height, width = feature_map.shape
    return torch.stack([feature_map[:, :, y, x] for y in range(height) for x in range(width)], dim=1)


def _features(encoder: Encoder, photos: Tensor) -> Tensor:
    """Return features in float64: what is computed in another order is then far from what is computed wrongly."""
    return encoder.double()(photos.double())


@torch.no_grad()
def _torchvision_map(network: Any, photos: Tensor, last: str) -> Tensor:
    network, photos = copy.deepcopy(network).double(), photos.double()
    values = network.maxpool(network.relu(network.bn1(network.conv1(photos))))
    for name in ("layer1", "layer2", "layer3", "layer4"):
        values = getattr(network, name)(values)
        if name == last:
            break
    return values


def _state_bits(module: nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in module.state_dict().items()}


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    return _seeded(torchvision.models.resnet18)


@pytest.fixture(scope="module")
def resnet18_file(resnet18: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> str:
    return _save(resnet18, tmp_path_factory.mktemp("weights") / "resnet18.safetensors")


def _resnet18_encoder(**settings: Any) -> Encoder:
    torch.manual_seed(0)
    return Encoder(build_backbone("resnet18"), **settings)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_resnet50_file_gives_torchvisions_features(tmp_path: Path, suffix: str) -> None:
    reference = _seeded(torchvision.models.resnet50)
    path = _save(reference, tmp_path / f"resnet50{suffix}")
    encoder = Encoder(build_backbone("resnet50", weights=path))
    features = _features(encoder, _photos(64, 1))
    expected = _cells(_torchvision_map(reference, _photos(64, 1), "layer4"))
    assert features.shape == (1, 4, 2048)
    assert encoder.channels == 2048
    assert expected.std() > 0.1
    torch.testing.assert_close(features, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("last_block", "channels"), [("layer1", 64), ("layer3", 256), (None, 512)])
def test_last_block_cuts_a_resnet(
    resnet18: nn.Module, resnet18_file: str, last_block: str | None, channels: int
) -> None:
    backbone = build_backbone("resnet18", last_block, resnet18_file)
    expected = _cells(_torchvision_map(resnet18, _photos(), last_block or "layer4"))
    assert backbone.channels == channels
    torch.testing.assert_close(_features(Encoder(backbone), _photos()), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("grid", "side"), [(14, 224), (1, 64), (2, 96)])
def test_grid_pools_as_torch_does(resnet18: nn.Module, resnet18_file: str, grid: int, side: int) -> None:
    encoder = Encoder(build_backbone("resnet18", weights=resnet18_file), grid=grid)
    features = _features(encoder, _photos(side, 1))
    feature_map = _torchvision_map(resnet18, _photos(side, 1), "layer4")
    expected = _cells(nn.AdaptiveAvgPool2d(grid)(feature_map))
    repeats = encoder.repeats(features.shape[1])
    assert repeats == (4 if grid == 14 else 1)  # a map of 7x7 has no more to give than its 49 cells
    assert features.shape == (1, grid * grid // repeats, 512)
    times = math.isqrt(repeats)
    shown = features.unflatten(1, (grid // times, -1)).repeat_interleave(times, 1).repeat_interleave(times, 2)
    torch.testing.assert_close(shown.flatten(1, 2), expected, rtol=1e-9, atol=1e-9)


def test_photos_that_are_not_square(resnet18: nn.Module, resnet18_file: str) -> None:
    photos = torch.randn(1, 3, 64, 128, generator=torch.Generator().manual_seed(5))
    features = _features(Encoder(build_backbone("resnet18", weights=resnet18_file)), photos)
    torch.testing.assert_close(features, _cells(_torchvision_map(resnet18, photos, "layer4")), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["resnet10t", "test_efficientnet"])
def test_timm_backbone_gives_timms_features(tmp_path: Path, name: str) -> None:
    reference: Any = _seeded(lambda: timm.create_model(name, pretrained=False, num_classes=0, global_pool=""))
    backbone = build_backbone(f"timm/{name}", weights=_save(reference, tmp_path / "weights.safetensors"))
    with torch.no_grad():
        expected = _cells(reference.double().forward_features(_photos().double()))
    torch.testing.assert_close(_features(Encoder(backbone), _photos()), expected, rtol=1e-9, atol=1e-9)
    assert backbone.channels == reference.num_features
    assert (backbone.mean, backbone.std) == (reference.pretrained_cfg["mean"], reference.pretrained_cfg["std"])


@pytest.mark.parametrize(
    ("name", "last_block", "tap"), [("resnet10t", "layer3", 3), ("test_efficientnet", "blocks.4", -1)]
)
def test_timm_backbone_ends_with_its_last_block_as_timms_taps_do(
    tmp_path: Path, name: str, last_block: str, tap: int
) -> None:
    reference: Any = _seeded(lambda: timm.create_model(name, pretrained=False, num_classes=0, global_pool=""))
    backbone = build_backbone(f"timm/{name}", last_block, _save(reference, tmp_path / "weights.safetensors"))
    with torch.no_grad():
        taps = reference.double().forward_intermediates(_photos().double(), intermediates_only=True)
    torch.testing.assert_close(_features(Encoder(backbone), _photos()), _cells(taps[tap]), rtol=1e-9, atol=1e-9)
    assert backbone.channels == taps[tap].shape[1]


def test_timm_mobilenet_gives_its_unpooled_features(tmp_path: Path) -> None:
    """MobileNetV3 has a convolution behind its pooling; without the pooling it belongs to the feature map."""
    reference: Any = _seeded(
        lambda: timm.create_model("mobilenetv3_small_050", pretrained=False, num_classes=0, global_pool="")
    )
    path = _save(reference, tmp_path / "weights.safetensors")
    reference.double()
    with torch.no_grad():
        expected = _cells(reference.act2(reference.conv_head(reference.forward_features(_photos().double()))))
    encoder = Encoder(build_backbone("timm/mobilenetv3_small_050", weights=path))
    torch.testing.assert_close(_features(encoder, _photos()), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto", "mobilenetv3_small_050"])
def test_timm_file_with_its_classifier_loads(tmp_path: Path, name: str) -> None:
    """Files of the hub hold the whole network; what the classifier is called differs from family to family."""
    torch.manual_seed(0)
    whole: Any = timm.create_model(name, pretrained=False)
    assert whole.get_classifier().weight.shape[0] == 1000
    backbone = build_backbone(f"timm/{name}", weights=_save(whole, tmp_path / "model.safetensors"))
    loaded = backbone.network.state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in whole.state_dict().items() if key in loaded)


def test_a_weights_file_in_the_home_of_the_user(
    resnet18: nn.Module, resnet18_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(Path(resnet18_file).parent))
    found = build_backbone("resnet18", weights="~/resnet18.safetensors").network
    assert _state_bits(found) == _state_bits(build_backbone("resnet18", weights=resnet18_file).network)


def test_same_weights_from_a_nested_state_dict(tmp_path: Path, resnet18: nn.Module, resnet18_file: str) -> None:
    torch.save({"state_dict": resnet18.state_dict(), "epoch": 3}, tmp_path / "nested.pth")
    nested = build_backbone("resnet18", weights=str(tmp_path / "nested.pth")).network
    assert _state_bits(nested) == _state_bits(build_backbone("resnet18", weights=resnet18_file).network)


@pytest.mark.parametrize("batch_norm", ["frozen", "train"])
def test_frozen_encoder_changes_by_no_bit(batch_norm: Any) -> None:
    encoder = _resnet18_encoder(batch_norm=batch_norm)
    head = nn.Linear(encoder.channels, 1)
    model = nn.ModuleList([encoder, head]).train()
    before = _state_bits(encoder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(2):
        head(encoder(_photos())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert encoder.is_frozen
    assert _state_bits(encoder) == before
    assert all(p.grad is None and not p.requires_grad for p in encoder.parameters())
    assert not any(module.training for module in encoder.network.modules())


def test_frozen_encoder_gives_the_same_features_in_both_modes() -> None:
    encoder = _resnet18_encoder()
    trained = encoder.train()(_photos())
    assert not trained.requires_grad
    assert torch.equal(trained, encoder.eval()(_photos()))


BLOCKS = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]


@pytest.fixture(scope="module")
def shared_backbone() -> Backbone:
    """One for several encoders: each must set all that it promises, whatever the one before it left."""
    return build_backbone("resnet18")


@pytest.mark.parametrize("batch_norm", ["frozen", "train"])
@pytest.mark.parametrize("trainable_from", [*BLOCKS, "all"])
def test_exactly_the_blocks_from_there_on_train(
    shared_backbone: Backbone, trainable_from: str, batch_norm: Any
) -> None:
    first = 0 if trainable_from == "all" else BLOCKS.index(trainable_from)
    encoder = Encoder(shared_backbone, trainable_from=trainable_from, batch_norm=batch_norm)
    for mode in (True, False, True):
        encoder.train(mode)
        for index, name in enumerate(BLOCKS):
            block = encoder.network.get_submodule(name)
            trains = index >= first
            assert all(p.requires_grad == trains for p in block.parameters())
            for module in block.modules():
                is_norm = isinstance(module, nn.BatchNorm2d)
                assert module.training == (mode and trains and (batch_norm == "train" or not is_norm)), name


@pytest.mark.parametrize("batch_norm", ["frozen", "train"])
def test_a_step_moves_the_trainable_blocks_and_no_others(batch_norm: Any) -> None:
    encoder = _resnet18_encoder(trainable_from="layer4", batch_norm=batch_norm).train()
    before = {name: tensor.clone() for name, tensor in encoder.network.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], lr=0.1)
    encoder(_photos()).square().sum().backward()
    optimizer.step()
    changed = {name for name, tensor in encoder.network.state_dict().items() if not torch.equal(tensor, before[name])}
    parameters = {name for name, _ in encoder.network.named_parameters() if name.startswith("layer4")}
    statistics = {name for name, _ in encoder.network.named_buffers() if name.startswith("layer4")}
    assert changed == (parameters if batch_norm == "frozen" else parameters | statistics)


def test_batch_norm_uses_the_statistics_it_is_told_to() -> None:
    """The features of a photo depend on the rest of the batch only where batch statistics are used."""
    photos = _photos(count=4)
    for batch_norm, alike in (("frozen", True), ("train", False)):
        encoder = _resnet18_encoder(trainable_from="layer4", batch_norm=batch_norm).train()
        alone, together = encoder(photos[:2]), encoder(photos)[:2]
        assert torch.allclose(alone, together, atol=1e-4) == alike


@pytest.mark.parametrize("trainable_from", ["blocks.3", "blocks.0"])
def test_timm_blocks_have_names_too(trainable_from: str) -> None:
    encoder = Encoder(build_backbone("timm/mobilenetv3_small_050"), trainable_from=trainable_from).train()
    trains = {n for n, p in encoder.network.named_parameters() if p.requires_grad}
    number = int(trainable_from[-1])
    expected = {
        name
        for name, _ in encoder.network.named_parameters()
        if name.startswith("conv_head") or (name.startswith("blocks.") and int(name.split(".")[1]) >= number)
    }
    assert trains == expected


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (("resnet51",), ("encoder.name", "'resnet51'", "did you mean 'resnet50'")),
        (("vgg16",), ("encoder.name", "'vgg16'", "resnet18", "timm/")),
        (("timm/resnet1",), ("encoder.name", "'resnet1'", "did you mean 'resnet")),
        (("timm/resnet18.no_such_tag",), ("encoder.name", "no_such_tag")),
        (("timm/resnet18", "layr3"), ("encoder.last_block", "'layr3'", "did you mean 'layer3'")),
        (("resnet18", "layr3"), ("encoder.last_block", "'layr3'", "did you mean 'layer3'")),
        (("resnet18", "fc"), ("encoder.last_block", "'fc'", "layer4")),
        (("resnet18", None, "IMAGENET1K_V9"), ("encoder.weights", "'IMAGENET1K_V9'", "did you mean 'IMAGENET1K_V1'")),
        (("resnet18", None, "x"), ("encoder.weights", "'x'", "DEFAULT", "none", "IMAGENET1K_V1")),
        (("timm/resnet18", None, "IMAGENET1K_V1"), ("encoder.weights", "'IMAGENET1K_V1'", "DEFAULT")),
        (("timm/vit_tiny_patch16_224",), ("encoder.name", "feature map", "convolutional")),
        (("timm/swin_tiny_patch4_window7_224",), ("encoder.name", "feature map", "convolutional")),
    ],
    ids=lambda value: "-".join(map(str, value)) if len(value) < 4 else None,
)
def test_mistakes_in_names_are_usage_errors(arguments: tuple[Any, ...], fragments: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        build_backbone(*arguments)
    (mistake,) = caught.value.lines
    assert "\n" not in mistake
    for fragment in fragments:
        assert fragment in mistake


@pytest.mark.parametrize(
    ("block", "suggestion"), [("layer_3", "'layer3'"), ("fc", "layer1"), ("relu", "all"), ("", "layer1")]
)
def test_unknown_block_is_a_usage_error(shared_backbone: Backbone, block: str, suggestion: str) -> None:
    with pytest.raises(UsageError, match=r"encoder\.trainable_from") as caught:
        Encoder(shared_backbone, trainable_from=block)
    assert repr(block) in str(caught.value)
    assert suggestion in str(caught.value)


@pytest.mark.parametrize("name", ["missing.pth", "missing.safetensors", "missing.pt", "folder"])
def test_missing_file_is_a_usage_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match=name) as caught:
        build_backbone("resnet18", weights=str(tmp_path / name))
    assert "no such file" in str(caught.value)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _replace_by_text(path: Path) -> None:
    path.write_text("<!DOCTYPE html><title>404</title>")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("damage", [_truncate, _empty, _replace_by_text])
def test_damaged_file_is_a_checkpoint_error(
    tmp_path: Path, resnet18: nn.Module, suffix: str, damage: Callable[[Path], None]
) -> None:
    path = tmp_path / f"weights{suffix}"
    _save(resnet18, path)
    damage(path)
    with pytest.raises(CheckpointError) as caught:
        read_state_dict(path)
    (mistake,) = caught.value.lines
    assert mistake.startswith(f"{path}: ")
    assert "\n" not in mistake


class _Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.path}'",)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize("container", ["zip", "legacy", "plain pickle"])
@pytest.mark.parametrize("nested", [False, True])
def test_nothing_in_a_weights_file_is_executed(tmp_path: Path, suffix: str, container: str, nested: bool) -> None:
    canary = tmp_path / "canary"
    path = tmp_path / f"evil{suffix}"
    payload = {"state_dict": {"conv1.weight": torch.zeros(1), "x": _Canary(canary)}} if nested else _Canary(canary)
    if container == "plain pickle":
        path.write_bytes(pickle.dumps(payload))
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=container == "zip")
    with pytest.raises(CheckpointError, match="evil"):
        read_state_dict(path)
    assert not canary.exists()


@pytest.mark.parametrize("name", ["resnet18", "timm/resnet10t"])
def test_backbones_read_weights_in_that_way(tmp_path: Path, name: str) -> None:
    torch.save(_Canary(tmp_path / "canary"), tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="evil"):
        build_backbone(name, weights=str(tmp_path / "evil.pth"))
    assert not (tmp_path / "canary").exists()


def test_the_canary_of_the_test_above_would_run(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(_Canary(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("make", "fragment"),
    [
        (lambda: torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [2, 2, 3, 2]), "unknown"),
        (lambda: torchvision.models.squeezenet1_1(num_classes=2), "missing"),
        (lambda: torchvision.models.resnet18(norm_layer=nn.InstanceNorm2d), "missing"),
        (lambda: nn.Sequential(), "missing"),
        (lambda: nn.DataParallel(torchvision.models.resnet18()), "unknown"),
    ],
    ids=["deeper", "other family", "other norm", "empty", "wrapped"],
)
def test_weights_of_another_network_are_refused(tmp_path: Path, make: Callable[[], nn.Module], fragment: str) -> None:
    path = _save(make(), tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="other") as caught:
        build_backbone("resnet18", weights=path)
    assert fragment in str(caught.value)
    assert "encoder.name" in str(caught.value)


def test_weights_of_another_width_are_refused(tmp_path: Path, resnet18: nn.Module) -> None:
    """As between ResNet-50 and its wide sister: the same names, other shapes."""
    torch.save(resnet18.state_dict() | {"layer2.0.conv1.weight": torch.zeros(256, 64, 3, 3)}, tmp_path / "wide.pth")
    with pytest.raises(CheckpointError, match=r"wide\.pth") as caught:
        build_backbone("resnet18", weights=str(tmp_path / "wide.pth"))
    for fragment in ("layer2.0.conv1.weight", "(256, 64, 3, 3)", "(128, 64, 3, 3)", "encoder.name"):
        assert fragment in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [torch.zeros(3), [torch.zeros(3)], {"model": {"conv1.weight": torch.zeros(1)}}, {"a": 1}, {"state_dict": 5}, {}]
    + [{0: torch.zeros(1)}],
    ids=["tensor", "list", "nested", "number", "state_dict of a number", "empty", "keys that are numbers"],
)
def test_file_that_is_no_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "odd.pth"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"odd\.pth"):
        build_backbone("resnet18", weights=str(path))


def test_weights_that_fit_but_for_the_classifier_load(tmp_path: Path, resnet18: nn.Module) -> None:
    """A network that was fine-tuned on other classes, saved before BatchNorm counted batches."""
    state = {n: t for n, t in resnet18.state_dict().items() if not n.endswith("num_batches_tracked")}
    state |= {"fc.weight": torch.zeros(7, 512), "fc.bias": torch.zeros(7)}
    torch.save(state, tmp_path / "weights.pth")
    features = _features(Encoder(build_backbone("resnet18", weights=str(tmp_path / "weights.pth"))), _photos())
    expected = _cells(_torchvision_map(resnet18, _photos(), "layer4"))
    torch.testing.assert_close(features, expected, rtol=1e-9, atol=1e-9)


def test_read_state_dict_gives_the_tensors_of_the_file(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3), "b": torch.arange(4)}
    save_file(tensors, tmp_path / "x.safetensors")
    torch.save(tensors, tmp_path / "x.pth")
    for name in ("x.safetensors", "x.pth"):
        read = read_state_dict(tmp_path / name)
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("weights", ["DEFAULT", "IMAGENET1K_V1"])
def test_download_without_a_network_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    started = time.perf_counter()
    with pytest.raises(CapdistError) as caught:
        build_backbone("resnet18", weights=weights)
    assert time.perf_counter() - started < 10
    assert isinstance(caught.value, StorageError)
    (mistake,) = caught.value.lines
    for fragment in ("encoder.weights", weights, "path", "none"):
        assert fragment in mistake
    assert "\n" not in mistake
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
