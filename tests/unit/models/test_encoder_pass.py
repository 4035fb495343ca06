"""The encoder pass gives the features of the plain network, in every mode of torch and in the precision asked for."""

from __future__ import annotations

import copy
import shutil
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from capdist.features.encoder_pass import EncoderPass, encoder_precision, has_fast_bfloat16
from capdist.models.encoder import Encoder
from capdist.recipe.sections import EncoderSection
from tests.unit.models.backbones import as_backbone, cells, copy_of, joined, make_backbone, photos


def _encoder(**settings: Any) -> Encoder:
    return Encoder(joined(make_backbone("resnet18", "layer1")), **settings)


@pytest.mark.parametrize(
    "name",
    ["resnet18", "resnext50_32x4d", "timm/resnet10t", "timm/mobilenetv2_050", "timm/tf_efficientnet_lite0"]
    + ["timm/densenet121", "timm/convnext_atto"],
)
@pytest.mark.parametrize("is_joined", [True, False])
@torch.no_grad()
def test_features_are_those_of_the_plain_network(name: str, is_joined: bool) -> None:
    backbone, images = make_backbone(name), photos(1, 48)
    plain = copy_of(backbone).network
    encoder = Encoder(joined(backbone) if is_joined else backbone, grid=1)
    expected = cells(nn.functional.adaptive_avg_pool2d(plain(images), 1))
    assert expected.std() > 0.01
    torch.testing.assert_close(EncoderPass(encoder)(images), expected, rtol=1e-9, atol=1e-9)
    single = EncoderPass(encoder.float())(images.float())
    assert single.dtype == torch.float32
    assert (single - expected).abs().max() < 1e-4 * expected.std()


@pytest.mark.parametrize("is_joined", [True, False])
@pytest.mark.parametrize("name", ["resnet18", "timm/mobilenetv2_050", "timm/tf_efficientnet_lite0"])
def test_no_norm_is_left_and_the_activation_is(name: str, is_joined: bool) -> None:
    backbone = make_backbone(name)
    fast = EncoderPass(Encoder(joined(backbone) if is_joined else backbone))._network
    assert not [module for module in fast.modules() if isinstance(module, _BatchNorm)]
    assert [module for module in fast.modules() if isinstance(module, nn.ReLU | nn.ReLU6)]


@pytest.mark.parametrize("is_joined", [True, False])
@pytest.mark.parametrize("settings", [{}, {"trainable_from": "layer1", "batch_norm": "train"}])
def test_the_encoder_is_left_unchanged(settings: dict[str, Any], is_joined: bool) -> None:
    backbone = make_backbone("resnet18", "layer1")
    encoder = Encoder(joined(backbone) if is_joined else backbone, **settings).train()

    def look() -> tuple[Any, ...]:
        state = {name: tensor.numpy().tobytes() for name, tensor in encoder.state_dict().items()}
        flags = [parameter.requires_grad for parameter in encoder.parameters()]
        modules = [(id(module), type(module), module.training) for module in encoder.modules()]
        return state, flags, modules, [id(parameter) for parameter in encoder.parameters()]

    before, strides = look(), [p.stride() for p in encoder.parameters()]
    EncoderPass(encoder)(photos())
    assert look() == before
    assert [p.stride() for p in encoder.parameters()] == strides


def test_an_encoder_that_trains_is_evaluated_with_the_weights_of_the_moment() -> None:
    layers = OrderedDict(conv1=nn.Conv2d(3, 8, 3), bn1=nn.BatchNorm2d(8), relu=nn.ReLU(), bn2=nn.BatchNorm2d(8))
    network = nn.Sequential(layers | {"dropout": nn.Dropout(0.5)})
    encoder = Encoder(as_backbone(network, 8), trainable_from="all", batch_norm="train").train()
    expected = copy.deepcopy(encoder).eval()(photos())
    fast = EncoderPass(encoder)
    torch.testing.assert_close(fast(photos()), expected, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        encoder.network.conv1.weight.mul_(2)
    torch.testing.assert_close(fast(photos()), expected, rtol=1e-9, atol=1e-9)
    changed = EncoderPass(encoder)(photos())
    assert not torch.allclose(changed, expected)
    torch.testing.assert_close(changed, encoder.eval()(photos()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("made_in", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("called_in", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_works_in_every_mode_and_a_decoder_can_train_on_it(made_in: Any, called_in: Any) -> None:
    with made_in():
        fast = EncoderPass(_encoder())
    assert not any(parameter.is_inference() for parameter in fast._network.parameters())
    with called_in():
        features = fast(photos())
    assert not features.requires_grad
    weight = torch.ones(features.shape[-1], dtype=torch.float64, requires_grad=True)
    (features @ weight).sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, features.sum(dim=(0, 1)))


def test_precision_is_the_one_asked_for() -> None:
    encoder = _encoder().float()
    images = photos(1).float()
    single, half = EncoderPass(encoder), EncoderPass(encoder, "bf16")
    expected, rounded = single(images), half(images)
    assert (expected.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
    assert 1e-4 < (rounded - expected).abs().max() / expected.std() < 0.2
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(single(images), expected)
        assert torch.equal(half(images), rounded)


@pytest.mark.parametrize("raised", [RuntimeError("no compiler\nin 99 lines"), KeyError(), OSError("x" * 999)])
def test_compiler_that_fails_is_reported_in_a_line_and_not_needed(
    monkeypatch: pytest.MonkeyPatch, raised: Exception
) -> None:
    def fail(pixel_values: Tensor) -> Tensor:
        raise raised

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail)
    fast = EncoderPass(_encoder())
    expected = fast(photos())
    reason = fast.compile(photos())
    assert reason is not None
    assert reason.startswith(type(raised).__name__)
    assert "\n" not in reason
    assert len(reason) < 250
    assert torch.equal(fast(photos()), expected)


def test_batches_of_the_size_or_less_go_to_the_compiled_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in notes the sizes that it is given. A real compiler would compile again for each new one."""
    sizes = []

    def compiled(network: nn.Module, **_: Any) -> Any:
        def run(pixel_values: Tensor) -> Tensor:
            assert torch.is_inference_mode_enabled() is torch.is_grad_enabled() is pixel_values.is_inference() is False
            sizes.append(tuple(pixel_values.shape))
            return network(pixel_values)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    fast, plain = EncoderPass(_encoder()), EncoderPass(_encoder())
    assert fast.compile(photos(4)) is None
    for count, side in ((4, 64), (1, 64), (3, 64), (5, 64), (4, 32)):
        images = photos(count, side)
        torch.testing.assert_close(fast(images), plain(images), rtol=1e-9, atol=1e-9)
        with torch.inference_mode():
            torch.testing.assert_close(fast(images.clone()), plain(images), rtol=1e-9, atol=1e-9)
    assert sizes == [(4, 3, 64, 64)] * 7


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_network_gives_the_same_features() -> None:
    from torch._dynamo.utils import counters
    from torch._inductor import config

    encoder = Encoder(make_backbone("resnet18", "layer1")).float()
    fast, plain = EncoderPass(encoder), EncoderPass(encoder)
    images = photos(4, 32).float()
    with config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        reason = fast.compile(images)
        assert reason is not None
        assert "no-such-compiler" in reason or "compiler" in reason.lower()
        assert torch.equal(fast(images), plain(images))
    if not any(map(shutil.which, ("g++", "clang++", "cl"))):
        pytest.skip("there is no C++ compiler")
    assert fast.compile(images) is None
    counters.clear()
    expected = plain(images)
    for count in (4, 1, 3):
        torch.testing.assert_close(fast(images[:count]), expected[:count], rtol=1e-4, atol=1e-4)
        with torch.inference_mode():
            torch.testing.assert_close(fast(images[:count].clone()), expected[:count], rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 0, "a call compiled anew"
    with torch.no_grad():
        fast._network.network.conv1.weight.zero_()
    torch.testing.assert_close(fast(images), expected, rtol=1e-4, atol=1e-4)  # frozen: laid out anew in advance


@pytest.mark.parametrize(
    ("capabilities", "fast"),
    [({}, False), ({"avx2": True}, False), ({"avx512_f": True}, False), ({"avx512_bf16": True}, True)]
    + [({"amx_bf16": True, "avx512_bf16": False}, True), ({"amx_bf16": False}, False)],
)
def test_processors_with_bfloat16(monkeypatch: pytest.MonkeyPatch, capabilities: Any, fast: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert has_fast_bfloat16(torch.device("cpu")) is fast
    assert has_fast_bfloat16(torch.device("mps")) is False
    section = EncoderSection()
    assert encoder_precision(section, torch.device("cpu"), "fp16") == ("bf16" if fast else "no")


def test_processor_of_a_torch_that_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert has_fast_bfloat16(torch.device("cpu")) is False


@pytest.mark.parametrize("supported", [True, False])
def test_gpus_are_asked_for_units_of_their_own(monkeypatch: pytest.MonkeyPatch, supported: bool) -> None:
    asked = []

    class _Device:
        def __init__(self, device: torch.device) -> None:
            asked.append(device)

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    def is_supported(including_emulation: bool = True) -> bool:
        return supported or including_emulation

    monkeypatch.setattr(torch.cuda, "device", _Device)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert has_fast_bfloat16(torch.device("cuda", 1)) is supported
    assert asked == [torch.device("cuda", 1)]


@pytest.mark.parametrize(
    ("precision", "mixed_precision", "expected"),
    [("no", "bf16", "no"), ("bf16", "no", "bf16"), ("inherit", "bf16", "bf16"), ("inherit", "fp16", "fp16")]
    + [("inherit", "no", "no"), ("inherit", "fp8", "no")],
)
def test_precision_of_a_recipe(
    monkeypatch: pytest.MonkeyPatch, precision: Any, mixed_precision: str, expected: str
) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)  # not to be asked
    section = EncoderSection(precision=precision)
    assert encoder_precision(section, torch.device("cpu"), mixed_precision) == expected


def test_photos_of_a_network_without_norms() -> None:
    encoder = Encoder(as_backbone(nn.Sequential(nn.Conv2d(3, 8, 3)), 8))
    torch.testing.assert_close(EncoderPass(encoder)(photos()), encoder(photos()), rtol=1e-9, atol=1e-9)
