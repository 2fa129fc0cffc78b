"""Weights of a local file go where they belong, and the report says what did not."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from medseg_reg.errors import MedsegError
from medseg_reg.insertion import insert, place
from medseg_reg.networks import UNet, UNet3Plus
from medseg_reg.networks.build import build_network
from medseg_reg.networks.pretrained import load_pretrained


def unet(seed: int = 0, **more: Any) -> UNet:
    torch.manual_seed(seed)
    return UNet(2, **{"in_channels": 1, "out_channels": 2, "channels": (4, 6, 8), **more})


def smp_unet(seed: int = 0, channels: int = 1, encoder: str = "resnet18") -> nn.Module:
    torch.manual_seed(seed)
    return build_network(
        in_channels=channels, classes=2, head="softmax", name="smp.Unet", encoder_name=encoder
    )


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def keep(weights: Mapping[str, Tensor], path: Path, wrap: str = "") -> Path:
    if path.suffix == ".safetensors":
        save_file(dict(weights), path)
    else:
        torch.save({wrap: dict(weights), "epoch": 3} if wrap else dict(weights), path)
    return path


@pytest.mark.parametrize(
    ("file", "wrap", "prefix"),
    [
        ("w.safetensors", "", ""),
        ("w.pt", "", "module."),
        ("w.ckpt", "state_dict", "network."),
        ("w.pth", "model", "model."),
    ],
)
def test_a_whole_network_is_loaded_from_any_usual_file(
    tmp_path: Path, file: str, wrap: str, prefix: str
) -> None:
    source, target = unet(1), unet(2)
    weights = {f"{prefix}{key}": value for key, value in source.state_dict().items()}
    report = load_pretrained(target, keep(weights, tmp_path / file, wrap))
    assert same(source.state_dict(), target.state_dict())
    assert report.part == "network"
    assert len(report.taken) == len(weights)
    assert report.left_out == report.new == report.adapted == ()
    assert str(report).endswith(f"{len(weights)} tensors of the network taken")
    assert report.as_dict()["taken"] == list(report.taken)


@pytest.mark.parametrize("before", [False, True])
def test_regularizers_may_be_put_in_before_or_after(tmp_path: Path, before: bool) -> None:
    source, target = unet(1), unet(2)
    path = keep(source.state_dict(), tmp_path / "w.safetensors")
    if before:
        place(target, "dropout", ["*"], {"p": 0.5})
    load_pretrained(target, path)
    if not before:
        place(target, "dropout", ["*"], {"p": 0.5})
    assert same(source.state_dict(), target.state_dict())


def test_weights_of_a_regularized_foreign_network_are_its_own(tmp_path: Path) -> None:
    source, target, x = smp_unet(1), smp_unet(2), torch.rand(1, 1, 64, 64)
    path = keep(source.network.state_dict(), tmp_path / "w.safetensors")
    insert(target, "dropout", "head", example=x, p=0.5)
    report = load_pretrained(target, path)
    assert report.part == "network"
    assert torch.equal(source.eval()(x), target.eval()(x))


@pytest.mark.parametrize("prefix", ["", "encoder."])
def test_an_encoder_alone_is_recognized(tmp_path: Path, prefix: str) -> None:
    source, target = smp_unet(1), smp_unet(2)
    untouched = target.network.decoder.state_dict()
    untouched = {key: value.clone() for key, value in untouched.items()}
    weights = {f"{prefix}{k}": v for k, v in source.network.encoder.state_dict().items()}
    report = load_pretrained(target, keep(weights, tmp_path / "w.safetensors"))
    assert report.part == "encoder"
    assert same(source.network.encoder.state_dict(), target.network.encoder.state_dict())
    assert same(untouched, target.network.decoder.state_dict())


def test_the_encoder_of_our_networks_ends_with_the_bottleneck(tmp_path: Path) -> None:
    source, target = unet(1), UNet3Plus(2, 1, 2, channels=(4, 6, 8), cat_channels=3)
    weights = {k: v for k, v in source.state_dict().items() if k.startswith(("enc", "bott"))}
    report = load_pretrained(target, keep(weights, tmp_path / "w.safetensors"))
    assert report.part == "encoder"
    assert same(weights, {k: target.state_dict()[k] for k in weights})


def test_an_encoder_of_color_images_is_adapted_to_gray_ones(tmp_path: Path) -> None:
    source, target = smp_unet(1, channels=3), smp_unet(2, channels=1)
    path = keep(source.network.encoder.state_dict(), tmp_path / "w.safetensors")
    report = load_pretrained(target, path)
    assert report.adapted == ("network.encoder.conv1.weight",)
    assert "1 adapted to the image channels (network.encoder.conv1.weight)" in str(report)
    gray = torch.rand(1, 1, 32, 32)
    features = [n.network.encoder.eval() for n in (source, target)]
    one, other = features[0](gray.expand(-1, 3, -1, -1))[-1], features[1](gray)[-1]
    assert torch.allclose(one, other, atol=1e-4)


def test_an_encoder_is_adapted_to_more_channels(tmp_path: Path) -> None:
    source, target = smp_unet(1, channels=3), smp_unet(2, channels=6)
    load_pretrained(target, keep(source.network.encoder.state_dict(), tmp_path / "w.safetensors"))
    first, second = (n.network.encoder.conv1.weight for n in (source, target))
    assert torch.allclose(second, torch.cat([first, first], 1) / 2)


def test_a_classifier_of_timm_fits_the_encoder_made_of_it(tmp_path: Path) -> None:
    import timm

    torch.manual_seed(1)
    source = timm.create_model("convnext_atto", in_chans=1, num_classes=3)
    target = smp_unet(2, encoder="tu-convnext_atto")
    path = keep(source.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(MedsegError, match="does not fit the encoder: .*pretrained_strict=false"):
        load_pretrained(target, path)
    report = load_pretrained(target, path, strict=False, part="encoder")
    assert report.new == ()
    assert {name.split(".")[0] for name in report.left_out} == {"head"}
    stem = target.network.encoder.model.stem_0.weight
    assert torch.equal(stem, source.stem[0].weight)
    blocks = target.network.encoder.model.stages_2.blocks[0].conv_dw.weight
    assert torch.equal(blocks, source.stages[2].blocks[0].conv_dw.weight)


def test_by_default_nothing_may_be_left_over_or_missing(tmp_path: Path) -> None:
    target = unet(2)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    weights = dict(unet(1).state_dict())
    del weights["classify.weight"], weights["classify.bias"]
    weights["extra.weight"] = torch.zeros(3)
    path = keep(weights, tmp_path / "w.safetensors")
    with pytest.raises(MedsegError) as error:
        load_pretrained(target, path)
    said = str(error.value)
    assert "1 have no place (extra.weight)" in said
    assert "2 are not in the file (classify.weight, classify.bias)" in said
    assert said.endswith("Set network.pretrained_strict=false to load what fits.")
    assert same(before, target.state_dict())
    report = load_pretrained(target, path, strict=False)
    assert report.left_out == ("extra.weight",)
    assert report.new == ("classify.weight", "classify.bias")
    assert "1 left out (extra.weight); 2 not in the file (classify.weight, classify.bias)" in str(
        report
    )
    for key, value in target.state_dict().items():
        assert torch.equal(value, before[key] if key in report.new else weights[key])


def test_another_width_is_named(tmp_path: Path) -> None:
    path = keep(unet(1, channels=(4, 6, 10)).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(MedsegError, match=r"'bottleneck\.conv1\.weight' has the shape \(10, 6,"):
        load_pretrained(unet(2), path)


def test_a_file_of_another_network_is_told_apart(tmp_path: Path) -> None:
    path = keep({"a": torch.zeros(2), "b": torch.ones(3)}, tmp_path / "w.safetensors")
    with pytest.raises(MedsegError, match="no tensor fits this network. The file has, .* a, b;"):
        load_pretrained(unet(), path)


def test_a_statistic_that_older_files_lack_is_not_missed(tmp_path: Path) -> None:
    weights = {k: v for k, v in unet(1).state_dict().items() if "num_batches" not in k}
    assert load_pretrained(unet(2), keep(weights, tmp_path / "w.safetensors")).new == ()


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("executed"),))


def test_no_code_of_a_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, write in (
        ("w.pt", torch.save),
        ("w.bin", lambda o, p: p.write_bytes(pickle.dumps(o))),
    ):
        write({"a": Code()}, tmp_path / name)
        with pytest.raises(MedsegError, match=r"w\.\w+: cannot be read as tensors alone"):
            load_pretrained(unet(), tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_a_missing_or_damaged_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MedsegError, match="none.pt: does not exist"):
        load_pretrained(unet(), tmp_path / "none.pt")
    (tmp_path / "w.safetensors").write_bytes(b"no tensors")
    with pytest.raises(MedsegError, match="w.safetensors: cannot be read"):
        load_pretrained(unet(), tmp_path / "w.safetensors")
    torch.save({"state_dict": {"epoch": 3}}, tmp_path / "w.pt")
    with pytest.raises(MedsegError, match="w.pt: holds no tensors by name"):
        load_pretrained(unet(), tmp_path / "w.pt")
