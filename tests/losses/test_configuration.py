"""The losses as a configuration names them."""

from __future__ import annotations

from pathlib import Path

import pytest

from medseg_reg.config import load_config, parse_config
from medseg_reg.config_regularization import TERMS, ErrorSpec
from medseg_reg.engine.fit import _loss
from medseg_reg.errors import MedsegError
from medseg_reg.losses import MixedLoss
from medseg_reg.losses.mixed import REGION_TERMS
from medseg_reg.train import main as train_main
from tests.stores import make_store
from tests.training import tiny_config, write_config


def config(error, network=None):
    content = {
        "name": "x",
        "data": {"store": "s", "split": {"kind": "fractions"}},
        "regularization": {"error": error},
    }
    return parse_config({**content, **({"network": network} if network else {})}, "x.yaml")


SUPERVISED = {"name": "unet3plus", "channels": [4, 8, 8], "deep_supervision": True}


def test_the_defaults_are_those_of_the_loss():
    assert repr(MixedLoss(**ErrorSpec().arguments)) == repr(MixedLoss())
    assert set(TERMS) == {"ce", "focal", *REGION_TERMS}


def test_every_key_reaches_the_loss():
    error = {
        **{name: 0.5 + number for number, name in enumerate(TERMS)},
        "class_weights": [1, 2, 3], "region_weights": [0, 2, 1], "label_smoothing": 0.1,
        "focal_gamma": 1.5, "tversky_alpha": 0.4, "tversky_beta": 0.6, "tversky_gamma": 1.25,
        "supervision": "halving",
    }  # fmt: skip
    loss = _loss(config(error, network=SUPERVISED), 3)
    assert loss.weights == {name: 0.5 + number for number, name in enumerate(TERMS)}
    assert loss.class_weights.tolist() == [1, 2, 3]
    assert loss.region_weights.tolist() == [0, 2, 1]
    assert (loss.label_smoothing, loss.focal_gamma, loss.tversky) == (0.1, 1.5, (0.4, 0.6, 1.25))
    assert loss.supervision == "halving"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ({"ce": 0}, "all weights are 0; give at least one of ce, dice, ssim, focal, iou, tversky"),
        ({"focal_gamma": 1}, "'focal_gamma' belongs to focal; none of them has a weight"),
        ({"tversky_alpha": 0.5}, "'tversky_alpha' belongs to tversky"),
        (
            {"region_weights": [1, 1]},
            "'region_weights' belongs to dice, ssim, iou, tversky, ms_ssim",
        ),
        ({"dice": 1, "region_weights": [1, 0]}, "region_weights are 0 for all classes but"),
        ({"tversky": 1, "tversky_alpha": 0, "tversky_beta": 0}, "are both 0"),
        ({"tversky": 1, "tversky_gamma": 0}, "greater than 0"),
        ({"supervision": [0, 0]}, "at least one output a weight"),
        ({"supervision": [1, 1]}, r"has 2 weights, the network has 1 outputs \(no deep_super"),
        ({"ce": 0, "dice": 1, "label_smoothing": 0.1}, "'label_smoothing' belongs to ce"),
    ],
)
def test_losses_that_cannot_be_meant_are_an_error(error, message):
    with pytest.raises(MedsegError, match=message):
        config(error)


def test_weights_of_the_outputs_are_counted_against_the_network():
    network = {"name": "unet3plus", "channels": [8, 16, 32], "deep_supervision": True}
    assert config({"supervision": [1, 1, 1]}, network).regularization.error.supervision == (1, 1, 1)
    with pytest.raises(MedsegError, match="supervision has 2 weights, the network has 3 outputs"):
        config({"supervision": [1, 1]}, network)


@pytest.mark.parametrize("key", ["class_weights", "region_weights"])
def test_weights_are_counted_against_the_classes(key):
    with pytest.raises(MedsegError, match=f"{key}: 2 weights for 3 classes"):
        _loss(config({"dice": 1, key: [1, 1]}), 3)


def test_the_hybrid_loss_of_unet3plus_trains(tmp_path, capsys):
    store = make_store(tmp_path / "store", cases=6, slices=2, size=48)
    content = tiny_config(store.path, tmp_path / "run", training__epochs=1)
    content["network"] = {
        "name": "unet3plus", "channels": [4, 8], "cat_channels": 4, "deep_supervision": True,
        "classification_guided": True,
    }  # fmt: skip
    content["regularization"] = {
        "error": {"ce": 0, "focal": 1, "ms_ssim": 1, "iou": 1, "boundary": 0.01}
    }
    train_main(["--config", str(write_config(tmp_path / "c.yaml", content))])
    assert (tmp_path / "run" / "summary.json").exists()
    assert "ms_ssim takes 3 of 5 scales at 48 x 48" in capsys.readouterr().out


def test_the_ready_hybrid_loss_differs_in_nothing_but_the_loss():
    folder = Path(__file__).parents[2] / "configs"
    names = ("bagls_small_unet3plus", "bagls_small_unet3plus_hybrid")
    plain, hybrid = (load_config(folder / f"{name}.yaml") for name in names)
    error = hybrid.regularization.error
    assert (error.focal, error.ms_ssim, error.iou, error.supervision) == (1, 1, 1, "equal")
    assert error.ce == error.dice == error.ssim == 0
    assert hybrid.network.deep_supervision
    assert hybrid.network.classification_guided
    for key in ("data", "network", "optimizer", "schedule", "training"):
        assert getattr(plain, key) == getattr(hybrid, key), key


def test_weights_of_outputs_that_a_network_does_not_have_are_refused():
    with pytest.raises(MedsegError, match=r"supervision is 'halving', which changes nothing"):
        config({"supervision": "halving"})
    assert config({"supervision": "halving"}, network=SUPERVISED)
