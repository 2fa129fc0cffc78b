"""Two processes that train the same transformer stay in step, whatever is in it.

One pair of processes serves all cases.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from medseg_reg.config_regularization import DistillationSpec
from medseg_reg.data.mix_token import MixToken
from medseg_reg.engine.distillation import Distillation
from medseg_reg.insertion import insert
from medseg_reg.losses import MixedLoss
from medseg_reg.networks import SparseExperts, TokenLabels, TokenSelection
from medseg_reg.networks.masked_autoencoder import MaskedAutoencoder, reconstruction_loss
from medseg_reg.networks.mixture import mix_head
from medseg_reg.networks.sparse_experts import use_experts
from medseg_reg.networks.token_encoder import token_encoder
from medseg_reg.networks.token_labels import use_token_labels
from medseg_reg.networks.token_selection import use_token_selection
from medseg_reg.regularizers import PatchDropout
from tests.insertion.test_patch_dropout_windows import CASES as WINDOWS
from tests.insertion.transformers import METHODS, TRANSFORMERS, Transformer, outputs, unfit
from tests.networks.test_masked_autoencoder import DECODER, SIZES
from tests.networks.test_masked_autoencoder import network as for_pretraining
from tests.processes import in_two_processes


class Task(nn.Module):
    """A network and its loss, in one pass, as the training has them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        labels = (x[:, 0] > 0.5).long()
        for module in self.network.modules():
            if isinstance(module, TokenLabels):
                module.labels = labels
        found = outputs(self.network, x)
        asked = [
            m.penalty
            for m in self.network.modules()
            if isinstance(m, (TokenLabels, TokenSelection, SparseExperts))
        ]
        return sum(y.square().mean() for y in found) + sum(filter(torch.is_tensor, asked))


class Pretraining(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        model = for_pretraining(name)
        encoder = token_encoder(model)
        self.mae = MaskedAutoencoder(encoder, 1, SIZES[name], factor=model.factor, **DECODER)

    def forward(self, x: Tensor) -> Tensor:
        prediction, hidden = self.mae(x)
        return reconstruction_loss(prediction, self.mae.targets(x), hidden)


class Lessons(nn.Module):
    """A student of mixed images and of a teacher, which is no part of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network, teacher = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(1, 3, 1)
        spec = DistillationSpec(teacher=Path("t"), weight=0.5)
        self.lesson = (Distillation(teacher, spec), MixToken(1.0, patch=(8, 8)))

    def forward(self, x: Tensor) -> Tensor:
        teach, mix = self.lesson
        batch = mix({"image": x, "mask": (x[:, 0] > 0.5).long()})
        x, labels = batch["image"], batch["mask"]
        loss, logits = MixedLoss(ce=1.0), self.network(x)
        found: Tensor = teach.mixed(loss(logits, labels), x, labels, logits, loss)
        return found


def dropouts(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A network with every dropout that suits it, in each of its places."""
    case: Transformer = TRANSFORMERS[name]
    network = case.network()
    for method in (*METHODS, "patch_dropout"):
        if not unfit(case, method):
            insert(network, method, METHODS.get(method), example=case.example(), p=0.3)
    return Task(network), case.shape


def windows() -> tuple[nn.Module, tuple[int, ...]]:
    case = WINDOWS["SwinUNETR"]
    network = case.network()
    for method in ("patch_dropout", "drop_key", "drop_head", "drop_path", "guided_key_dropout"):
        insert(network, method, METHODS.get(method), example=case.example(), p=0.3)
    use_token_labels(network, (1, *case.shape), "x", 2, taps=2)
    return Task(network), case.shape


def merging() -> tuple[nn.Module, tuple[int, ...]]:
    case = TRANSFORMERS["timm-vit"]
    network = case.network()
    use_token_labels(network, (1, *case.shape), "x", 2, taps=2)
    insert(network, "token_merging", example=case.example(), p=0.4)
    insert(network, "drop_key", example=case.example(), p=0.3)
    return Task(network), case.shape


def choosing() -> tuple[nn.Module, tuple[int, ...]]:
    case = TRANSFORMERS["UNETR"]
    network = case.network()
    use_experts(network, (1, *case.shape), "x", experts=3)
    mix_head(network, (1, *case.shape), 2, 2, "x")
    use_token_selection(network, (1, *case.shape), "x")
    insert(network, "gating_dropout", example=case.example(), p=0.5)
    insert(network, "tree_dropout", example=case.example(), p=0.5)
    return Task(network), case.shape


def routing() -> tuple[nn.Module, tuple[int, ...]]:
    case = TRANSFORMERS["timm-vit"]
    network = case.network()
    use_token_labels(network, (1, *case.shape), "x", 2, taps=2)
    use_experts(network, (1, *case.shape), "x", experts=3)
    insert(network, "gating_dropout", example=case.example(), p=0.5, mode="gate_expert_drop")
    return Task(network), case.shape


def fast_and_slow() -> tuple[nn.Module, tuple[int, ...]]:
    case = TRANSFORMERS["UNETR"]
    network = case.network()
    use_token_selection(network, (1, *case.shape), "x", keep=0.6, mode="feed_forward")
    insert(network, "drop_path", example=case.example(), p=0.3)
    return Task(network), case.shape


CASES: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    **{
        name: lambda name=name: dropouts(name)
        for name in ("UNETR", "timm-swin", "DPT", "Segformer")
    },
    "unfused": lambda: dropouts("timm-vit"),
    "windows of fewer patches": windows,
    "merged tokens with labels": merging,
    "experts, a tree and chosen tokens": choosing,
    "gates and experts that drop together": routing,
    "chosen tokens in feed-forward blocks": fast_and_slow,
    **{
        f"pre-training of {name}": lambda name=name: (Pretraining(name), (1, *SIZES[name]))
        for name in SIZES
    },
    "a teacher and mixed images": lambda: (Lessons(), (1, 32, 32)),
}


def train(name: str, rank: int) -> dict[str, Any]:
    """Two steps, of other images and other draws in each process."""
    task, shape = CASES[name]()
    weights = {key: one.clone() for key, one in task.state_dict().items()}
    parallel = DistributedDataParallel(task, find_unused_parameters=True)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.05)
    losses = []
    for step in range(2):
        torch.manual_seed(10 * rank + step)
        optimizer.zero_grad()
        loss = parallel.train()(torch.rand(2, *shape))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    tokens = [m.mask_token for m in task.modules() if isinstance(m, PatchDropout)]
    after = {key: one for key, one in task.named_parameters()}
    moved = [key for key, one in after.items() if key in weights and not one.equal(weights[key])]
    return {
        "losses": losses,
        "weights": {key: one.detach() for key, one in after.items()},
        "tokens": [token.detach() for token in tokens],
        "moved": moved,
    }


def work(rank: int) -> dict[str, Any]:
    return {name: train(name, rank) for name in CASES}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    pytest.importorskip("einops")
    pytest.importorskip("segmentation_models_pytorch")
    return in_two_processes(work, tmp_path_factory.mktemp("parallel"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("name", CASES)
def test_two_processes_stay_in_step(found: list[dict[str, Any]], name: str) -> None:
    first, second = (each[name] for each in found)
    assert first["losses"] != second["losses"]
    for key, weight in first["weights"].items():
        assert weight.isfinite().all(), key
        assert torch.equal(weight, second["weights"][key]), key
    assert all(map(torch.equal, first["tokens"], second["tokens"]))
    assert len(first["moved"]) > 0.5 * len(first["weights"])
