"""The network of a configuration: ours typed, foreign ones by name, and every mistake told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from medseg_reg.config import Config, parse_config
from medseg_reg.config_network import (
    FOREIGN_NAMES,
    OWN,
    OWN_NAMES,
    AttentionUNetSpec,
    ForeignSpec,
    UNet3PlusSpec,
    UNetSpec,
)
from medseg_reg.networks.build import OWN as BUILT
from medseg_reg.networks.build import build_network
from tests.test_config import again, content, load, refusal

SMALL = "{name: monai.UNet, channels: [4, 8], strides: [2]}"


def test_the_names_are_those_that_can_be_built() -> None:
    assert set(OWN_NAMES) == set(BUILT)
    assert [one.model_fields["name"].annotation.__args__[0] for one in OWN] == list(OWN_NAMES)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("{channels: [4, 8]}", UNetSpec),
        ("{name: unet}", UNetSpec),
        ("{name: attention_unet}", AttentionUNetSpec),
        ("{name: unet3plus, deep_supervision: true}", UNet3PlusSpec),
        (SMALL, ForeignSpec),
    ],
)
def test_the_name_decides_what_else_there_is(text: str, kind: type) -> None:
    config = load(f"network: {text}")
    assert type(config.network) is kind
    assert again(config) == config
    assert again(config).to_yaml() == config.to_yaml()


def test_the_defaults_of_the_configuration_are_those_of_the_networks() -> None:
    import inspect

    for spec, cls in zip(OWN, BUILT.values(), strict=True):
        signature = inspect.signature(cls).parameters
        own = {name: p.default for name, p in signature.items() if p.default is not p.empty}
        assert spec(name=spec.model_fields["name"].annotation.__args__[0]).arguments == own


def test_a_run_before_there_were_other_networks_is_read_as_it_was() -> None:
    old = {"name": "unet", "channels": [4, 8], "norm": "batch", "activation": "relu"}
    old |= {"upsample": "deconv", "head": "softmax"}
    network = Config.model_validate(content(network=old)).network
    assert network == UNetSpec(channels=(4, 8))
    assert network.pretrained is None


def test_a_foreign_network_keeps_its_own_arguments() -> None:
    network = load(f"network: {SMALL}", "network.dropout=0.2").network
    assert network.arguments == {"channels": [4, 8], "strides": [2], "dropout": 0.2}
    assert (network.head, network.pretrained_strict) == ("softmax", True)


def test_what_was_written_is_enough_to_build_it() -> None:
    for text in (SMALL, "{name: unet3plus, channels: [4, 8], cat_channels: 3}"):
        network = again(load(f"network: {text}")).network
        build_network(
            in_channels=1, classes=2, head="softmax", name=network.name, **network.arguments
        )


def test_files_of_weights_may_be_named_and_need_not_be_there() -> None:
    network = load("network: {pretrained: some/w.safetensors, pretrained_strict: false}").network
    assert (network.pretrained, network.pretrained_strict) == (Path("some/w.safetensors"), False)
    network = load("network: {name: smp.Unet, encoder_weights: some/w.pth}").network
    assert network.encoder_weights == Path("some/w.pth")
    assert again(load("network: {name: smp.Unet, encoder_weights: some/w.pth}")).network == network


# Mistakes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{name: unet3}", "'network': there is no network 'unet3'. Did you mean 'unet'?"),
        ("{name: smp.unet}", "Did you mean 'smp.Unet'?"),
        ("{name: [unet]}", "there is no network ['unet']"),
        ("{name: unet3plus, cat_chanels: 8}", "unknown key 'network.cat_chanels'. Did you mean"),
        ("{cat_channels: 8}", "unknown key 'network.cat_channels'"),
        ("{name: unet3plus, cat_channels: 0}", "'network.cat_channels': input should be greater"),
        ("{name: unet3plus, cat_channels: yes}", "'network.cat_channels': a switch is no number"),
        ("{name: unet3plus, deep_supervision: some}", "'network.deep_supervision': input should"),
        ("{name: unet3plus, upsample: linear}", "'network.upsample': input should be 'deconv'"),
        ("{name: attention_unet, channels: [4, 8]}", "'network': two levels have one skip"),
        ("{name: monai.UNet, channels: [4, 8]}", "'network': monai.UNet needs strides"),
        ("{name: monai.BasicUNet, feature: [4]}", "no argument 'feature'. Did you mean 'features'"),
        ("{name: monai.SegResNet, num_groups: 4}", "'num_groups' changes nothing"),
        ("{name: smp.Unet, encoder_weights: imagenet}", "expected null or a local file"),
        ("{name: smp.Unet, pretrained: true}", "'network.pretrained': give the path of a local"),
        ("{name: smp.Unet, head: sigmoidal}", "'network.head': input should be 'softmax'"),
        (
            "{name: smp.Unet, pretrained: a.pt, encoder_weights: b.pt}",
            "pretrained and encoder_weights are both given",
        ),
        ("3", "'network': input should be a valid dictionary"),
    ],
)
def test_a_mistake_names_the_key_the_line_and_the_mend(text: str, said: str) -> None:
    message = refusal(f"network: {text}")
    assert said in message
    assert "run.yaml:5: " in message


def test_keys_of_the_network_that_is_meant_are_listed() -> None:
    assert "classification_guided" in refusal("network: {name: unet3plus, cat: 8}")
    assert "gate_full_resolution" in refusal("network: {name: attention_unet, gate: 8}")
    assert "classification_guided" not in refusal("network: {name: unet, cat: 8}")


# The schema for editors


@pytest.mark.parametrize(
    ("network", "right"),
    [
        ({}, True),
        ({"channels": [4, 8]}, True),
        ({"name": "unet3plus", "cat_channels": 8}, True),
        ({"name": "attention_unet", "gate_full_resolution": True}, True),
        ({"name": "smp.Unet", "encoder_name": "resnet18"}, True),
        ({"cat_channels": 8}, False),
        ({"name": "unet", "gate_full_resolution": True}, False),
        ({"name": "unet3plus", "cat_channels": "wide"}, False),
        ({"name": "smp.Nothing"}, False),
    ],
)
def test_the_schema_knows_every_network(network: dict[str, Any], right: bool) -> None:
    validator = jsonschema.Draft202012Validator(Config.model_json_schema())
    assert validator.is_valid(content(network=network)) is right


def test_the_schema_lists_the_foreign_networks() -> None:
    schema = Config.model_json_schema()["$defs"]["ForeignSpec"]["properties"]["name"]
    assert schema["enum"] == list(FOREIGN_NAMES)


def test_foreign_packages_are_imported_only_where_one_is_named() -> None:
    code = (
        "import sys, yaml; from medseg_reg.config import Config;"
        "Config.model_validate({'name': 'x', 'data': {'store': 's', 'split': {'kind': 'counts',"
        " 'train': 3, 'val': 1}}});"
        "print([m for m in ('monai', 'segmentation_models_pytorch', 'timm') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_a_default_is_a_u_net_in_full() -> None:
    config = parse_config(content(), "x")
    assert config.network == UNetSpec()
    assert config.network.arguments["channels"] == (32, 64, 128, 256, 512)
