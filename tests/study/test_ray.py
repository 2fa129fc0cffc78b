"""On a cluster a study survives the loss of a machine, and a search finds what it finds here."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pandas as pd
import pytest

from medseg_reg.study.grid import expand
from medseg_reg.study.results import write_results
from medseg_reg.study.runner import run_cells
from medseg_reg.study.search.__main__ import run_search
from medseg_reg.study.search.spec import SearchSpec
from tests.stores import make_store
from tests.study.search.made_search import search_of
from tests.study.studies import ForkPool, study_of

import medseg_reg.train  # noqa: F401  isort: skip


def tiny_search(store: Path, folder: Path) -> SearchSpec:
    folder.mkdir()
    overrides = {"training.epochs": 3, "regularization.architecture": []}
    return search_of(store, folder, overrides=overrides)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")
def test_a_study_survives_the_loss_of_a_machine_and_a_search_runs_on_the_rest(tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed (the extra 'ray')")
    from ray.cluster_utils import Cluster

    from medseg_reg.study.ray_backend import RayPool

    store = make_store(tmp_path / "store", cases=6, slices=6, size=32).path
    straight = study_of(store, tmp_path / "straight", budget={"epochs": 6}, seeds=1)
    assert run_cells(straight, expand(straight), ForkPool()) == []
    study = study_of(store, tmp_path / "cluster", budget={"epochs": 6}, seeds=1)
    study.directory.mkdir(parents=True)
    search, elsewhere = (tiny_search(store, tmp_path / name) for name in ("here", "elsewhere"))
    here = run_search(search, ForkPool())
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        cluster.wait_for_nodes()
        pool = RayPool(cluster.address, study)
        assert pool.size == 2
        lost: list[Path] = []

        def lose_a_machine() -> None:
            runs = study.directory / "runs"
            while not list(runs.rglob("last.ckpt")):
                time.sleep(0.05)
            lost.extend(runs.rglob("last.ckpt"))
            cluster.remove_node(nodes[0], allow_graceful=False)

        thread = threading.Thread(target=lose_a_machine)
        thread.start()
        assert run_cells(study, expand(study), pool) == []
        thread.join()
        assert lost
        # On the machine that is left.
        found = run_search(elsewhere, RayPool(cluster.address, elsewhere))
        pd.testing.assert_frame_equal(found[0], here[0])
        assert found[1] == []
    finally:
        import ray

        ray.shutdown()
        cluster.shutdown()
    left, right = (write_results(one, expand(one)) for one in (straight, study))
    assert left.read_bytes() == right.read_bytes()
