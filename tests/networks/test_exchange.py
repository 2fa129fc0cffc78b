"""Two processes: one coin for both, all-to-all between them, and none where the coin says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from medseg_reg.networks import SparseExperts
from medseg_reg.regularizers import GatingDropout
from tests.processes import in_two_processes

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not dist.is_available(), reason="torch without distributed"),
]


def block(exchange: bool, top: int = 1, experts: int = 4, **more: Any) -> SparseExperts:
    torch.manual_seed(0)
    feed_forward = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))
    more = {"jitter": 0.0, "capacity": 1.0, **more}
    return SparseExperts(feed_forward, 6, experts, top, exchange=exchange, **more)


class Watched:
    """Counts all-to-all calls, and which experts are run, while it is open."""

    def __init__(self, part: SparseExperts) -> None:
        self.calls, self.asked = 0, set[int]()
        self.real = dist.all_to_all_single
        for number, expert in enumerate(part.experts):
            expert.register_forward_hook(lambda *_, number=number: self.asked.add(number))

    def __enter__(self) -> Watched:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return self.real(*args, **kwargs)

        dist.all_to_all_single = counted
        return self

    def __exit__(self, *error: object) -> None:
        dist.all_to_all_single = self.real


def tokens(rank: int, count: int = 20) -> torch.Tensor:
    return torch.randn(1, count + 3 * rank, 6, generator=torch.Generator().manual_seed(rank + 1))


def one_step(part: SparseExperts, rank: int) -> dict[str, Any]:
    """One pass there and back, what was called on the way, and the mean gradients."""
    x = tokens(rank).requires_grad_()
    with Watched(part) as watched:
        y = part(x)
        forward = watched.calls
        loss = y.square().mean()
        (loss if part.penalty is None else loss + part.penalty).backward()
    grads = []
    for weight in part.parameters():
        grad = torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
        dist.all_reduce(grad)
        grads.append(grad / dist.get_world_size())
    own = [e for e, f in enumerate(part.experts) if next(f.parameters()).grad is not None]
    asked = sorted(watched.asked)
    return {"y": y.detach(), "x": x.grad, "grads": grads, "asked": asked, "own": own,
            "calls": (forward, watched.calls - forward)}  # fmt: skip


def coins(rank: int) -> list[bool]:
    torch.manual_seed(100 + rank)  # the processes draw other numbers
    layer = GatingDropout(0.5)
    return [layer.decide(torch.device("cpu")) for _ in range(40)]


def gated(mode: str, taking_part: bool, **more: Any) -> SparseExperts:
    part = block(exchange=True, **more)
    layer = GatingDropout(0.5, mode)
    layer.taking_part = taking_part
    part.routing.append(layer)
    return part


def parallel_training(rank: int) -> dict[str, torch.Tensor]:
    """Eight steps of DDP with coins of the layer's own."""
    part = block(exchange=True)
    part.routing.append(GatingDropout(0.5))
    network = DistributedDataParallel(
        nn.Sequential(nn.Linear(6, 6), part), find_unused_parameters=True
    )
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for step in range(8):
        torch.manual_seed(10 * rank + step)
        optimizer.zero_grad()
        (network(torch.randn(2, 9 + rank, 6)).square().mean() + part.penalty).backward()
        optimizer.step()
    return network.module.state_dict()


def one_sided(exchange: bool, rank: int) -> dict[str, Any]:
    """A step under autocast in which every token wants the same expert of the same process."""
    part = block(exchange, capacity=9.0)
    with torch.no_grad():
        part.router.weight.zero_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return one_step(part, rank)


def work(rank: int) -> dict[str, Any]:
    found = {
        "coins": coins(rank),
        **{f"at home {top}": one_step(block(False, top), rank) for top in (1, 2)},
        **{f"exchange {top}": one_step(block(True, top), rank) for top in (1, 2)},
        "three experts": one_step(block(True, experts=3), rank),
        "three at home": one_step(block(False, experts=3), rank),
        "coin off": one_step(gated("gate_drop", False), rank),
        "gate_drop": one_step(gated("gate_drop", True), rank),
        "gate_expert_drop": one_step(gated("gate_expert_drop", True), rank),
        "one-sided": one_sided(True, rank),
        "one-sided at home": one_sided(False, rank),
        "weights": parallel_training(rank),
    }
    part = block(True).eval()
    with Watched(part) as watched:
        part(tokens(rank))
    found["calls in evaluation"] = watched.calls
    if rank == 0:  # alone, as one who inserts layers and measures their rates
        part = block(True).train()
        part.routing.append(GatingDropout(0.5))
        with torch.no_grad():
            found["alone"] = [bool(part(tokens(rank)).isfinite().all()) for _ in range(10)]
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return in_two_processes(work, tmp_path_factory.mktemp("exchange"))


Found = list[dict[str, Any]]


def test_all_processes_toss_one_coin(found: Found) -> None:
    first, second = (each["coins"] for each in found)
    assert first == second
    assert 5 < sum(first) < 35


@pytest.mark.parametrize("name", ["exchange 1", "exchange 2", "coin off", "three experts"])
def test_tokens_travel_there_and_back_and_so_do_gradients(found: Found, name: str) -> None:
    for each in found:
        assert each[name]["calls"] == (3, 2)  # numbers of tokens, tokens, answers; two gradients
    asked = [each[name]["asked"] for each in found]
    assert asked == ([[0, 1], [2, 3]] if "three" not in name else [[0, 1], [2]])


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("exchange 1", "at home 1"),
        ("exchange 2", "at home 2"),
        ("coin off", "at home 1"),
        ("three experts", "three at home"),
    ],
)
def test_the_exchange_changes_neither_answers_nor_gradients(
    found: Found, name: str, plain: str
) -> None:
    for each in found:
        for key in ("y", "x", "grads"):
            torch.testing.assert_close(each[name][key], each[plain][key], atol=1e-6, rtol=1e-5)
        assert each[plain]["calls"] == (0, 0)


def test_a_process_that_nobody_asks_is_no_problem_under_autocast(found: Found) -> None:
    assert sorted(len(each["one-sided"]["asked"]) for each in found) == [0, 1]
    for each in found:
        one, plain = each["one-sided"], each["one-sided at home"]
        torch.testing.assert_close(one["y"].float(), plain["y"].float(), atol=1e-2, rtol=1e-2)
        torch.testing.assert_close(one["grads"], plain["grads"], atol=1e-2, rtol=1e-2)


def test_a_step_that_keeps_tokens_at_home_makes_no_all_to_all(found: Found) -> None:
    for rank, each in enumerate(found):
        assert each["gate_drop"]["calls"] == (0, 0)
        own = [2 * rank, 2 * rank + 1]
        assert each["gate_drop"]["asked"] == own
        assert each["gate_drop"]["own"] == own
        answered = (each["gate_drop"]["y"] != 0).any(-1).float().mean()
        assert answered > 0.5  # the room at home is that of all machines
        assert each["gate_drop"]["grads"][0].abs().sum() > 0  # the router learns


def test_a_step_without_experts_runs_none_and_leaves_the_shortcut(found: Found) -> None:
    for each in found:
        dropped = each["gate_expert_drop"]
        assert (dropped["calls"], dropped["asked"]) == ((0, 0), [])
        assert (dropped["y"] == 0).all()
        assert dropped["grads"][0].abs().sum() > 0  # by the balance loss


def test_evaluation_exchanges_nothing(found: Found) -> None:
    assert [each["calls in evaluation"] for each in found] == [0, 0]


def test_a_process_that_looks_at_the_network_alone_waits_for_nobody(found: Found) -> None:
    assert found[0]["alone"] == [True] * 10


def test_data_parallel_training_keeps_the_processes_in_step(found: Found) -> None:
    first, second = (each["weights"] for each in found)
    assert all(torch.equal(first[key], second[key]) for key in first)
    start = nn.Sequential(nn.Linear(6, 6), block(exchange=True)).state_dict()
    moved = [key for key in first if not torch.equal(first[key], start[key])]
    assert {key.split(".")[2] for key in moved if "experts" in key} == {"0", "1", "2", "3"}


def test_more_processes_than_experts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from medseg_reg.networks import sparse_experts

    monkeypatch.setattr(sparse_experts, "machine", lambda: (0, 5))
    with pytest.raises(ValueError, match="4 experts for 5 processes"):
        block(exchange=True)(tokens(0))
    assert block(exchange=False)(tokens(0)).shape == (1, 20, 6)


def test_in_one_process_the_virtual_machine_of_a_sample_answers() -> None:
    part = block(exchange=True, capacity=9.0)
    layer = GatingDropout(0.5)
    layer.taking_part = True
    part.routing.append(layer)
    x = torch.randn(4, 8, 6)
    y = part(x)
    alone = block(exchange=False, capacity=9.0)
    with torch.no_grad():
        for expert in alone.experts[2:]:
            for weight in expert.parameters():
                weight.zero_()
    alone.routing.append(layer)
    torch.testing.assert_close(alone(x)[:2], y[:2])
    assert (alone(x)[2:] == 0).all()
    assert layer.taking_part is True
