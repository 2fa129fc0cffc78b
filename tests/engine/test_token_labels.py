"""Token labels and mixed tokens in a run: what is given to whom, and what changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from medseg_reg.config import parse_config
from medseg_reg.data.mix_token import MixToken
from medseg_reg.data.store import SliceStore
from medseg_reg.engine.fit import fit
from medseg_reg.engine.regularization import RegularizationControl
from medseg_reg.engine.run_directory import RunDirectory
from medseg_reg.errors import MedsegError
from medseg_reg.networks import TokenLabels
from tests.stores import make_store
from tests.training import interrupted_at, same_weights, tiny_config, tiny_unetr, trained

NETWORK = tiny_unetr(32)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SliceStore:
    return make_store(tmp_path_factory.mktemp("data") / "store", slices=2, size=32)


def train(store: SliceStore, path: Path, **changes: Any) -> RunDirectory:
    changes = {"training__epochs": 1, "regularization__architecture": [], **changes}
    return fit(parse_config(tiny_config(store.path, path, **changes), path.name))


def test_tokens_learn_from_the_mixed_labels_of_the_training_batches(
    store: SliceStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("einops")
    changes = {
        "network": {**NETWORK, "token_labels": {"taps": 2, "foreground": 3.0}},
        "regularization__mix_token": {},
    }
    mixed: list[torch.Tensor] = []
    watched: list[torch.Tensor | None] = []
    mix, watch = MixToken.__call__, TokenLabels.watch

    def noted(self: MixToken, batch: Any) -> Any:
        assert self.patch == (16, 16)
        found = mix(self, batch)
        mixed.append(found["mask"])
        return found

    def seen(self: TokenLabels, tokens: torch.Tensor) -> None:
        watch(self, tokens)
        assert (self.weight, self.foreground) == (0.25, 3.0)
        if torch.is_grad_enabled():
            watched.append(self.labels)

    with monkeypatch.context() as patch:
        patch.setattr(MixToken, "__call__", noted)
        patch.setattr(TokenLabels, "watch", seen)
        changes["regularization__architecture"] = []
        content = tiny_config(store.path, tmp_path / "run", training__epochs=1, **changes)
        trained(tmp_path / "run.yaml", content)
    run = RunDirectory(tmp_path / "run")
    assert (run.path / "summary.json").exists()
    assert len(mixed) == 3  # training batches alone, no validation
    assert len(watched) == 2 * len(mixed)
    for number, labels in enumerate(watched):
        assert labels is not None
        assert torch.equal(labels, mixed[number // 2])
    heads = {k: v for k, v in load_file(run.weights).items() if ".token_labels.head." in k}
    assert len(heads) == 2 * 4
    for key, value in heads.items():
        if key.endswith("0.weight"):  # of the norm, which begins with ones
            assert (value != 1).all()


@pytest.mark.slow
def test_weights_of_nothing_train_the_network_as_without(store: SliceStore, tmp_path: Path) -> None:
    pytest.importorskip("einops")
    layers = [{"name": "drop_key", "p": 0.2}]  # which draws numbers
    network = {**NETWORK, "token_labels": {"weight": 0}}
    both = {"regularization__architecture": layers}
    none = {"regularization__mix_token": {"p": 0}}
    train(store, tmp_path / "none", network=network, **none, **both)
    train(store, tmp_path / "plain", network=NETWORK, **both)
    ours, theirs = (load_file(tmp_path / n / "weights.safetensors") for n in ("none", "plain"))
    more = ours.keys() - theirs.keys()
    assert more
    assert all(".token_labels.head." in key for key in more)
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())


def test_a_network_without_tokens_is_mixed_where_patches_are_given_and_goes_on_where_it_stopped(
    store: SliceStore, tmp_path: Path
) -> None:
    with pytest.raises(MedsegError, match=r"^regularization\.mix_token: .*mix_token\.patch, as 16"):
        train(store, tmp_path / "none", regularization__mix_token={})
    assert not (tmp_path / "none").exists()
    changes = {"regularization__mix_token": {"patch": 8}, "training__epochs": 2}
    straight = train(store, tmp_path / "straight", **changes)
    plain = train(store, tmp_path / "plain", training__epochs=2)
    assert not same_weights(straight.path, plain.path)
    with interrupted_at(1, 1):
        train(store, tmp_path / "resumed", **changes)
    resumed = train(store, tmp_path / "resumed", **changes)
    assert same_weights(straight.path, resumed.path)


def test_tokens_are_told_which_pixels_are_ignored() -> None:
    layer, labels = TokenLabels(4, 2, (2, 2)), torch.tensor([[[0, 1], [255, 1]]])
    RegularizationControl(torch.nn.Sequential(layer), [], 0, ignored=255)._give_labels(labels)
    assert layer.labels is labels


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data__batch_size": 1, "regularization__mix_token": {}}, "batch_size is 1; give at"),
        ({"regularization__mix_token": {"p": 2}}, "mix_token.p"),
        ({"network": {**NETWORK, "token_labels": {"weight": -1}}}, "token_labels.weight"),
        ({"network": {**NETWORK, "token_labels": {"tap": 1}}}, "taps"),
        ({"network": {"channels": [4, 8], "token_labels": {}}}, "token_labels"),
    ],
)
def test_a_wrong_key_is_refused(store: SliceStore, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(MedsegError, match=said):
        parse_config(tiny_config(store.path, Path("r"), **changes), "test")
