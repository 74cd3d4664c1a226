"""Several nodes, simulated by Ray's own cluster utility, and one of them removed."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from embstore.core.events import Event, WorkersChanged
from tests.support.ray_session import through_ray
from tests.support.stores import build_small, journal_records, snapshot
from tests.support.tally import Counter
from tests.support.workers import Script, ScriptedSource


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head and one more node, a core each; dead nodes are noticed within a second or two."""
    import ray
    from ray.cluster_utils import Cluster

    settings = {"health_check_period_ms": 500, "health_check_failure_threshold": 2, "health_check_initial_delay_ms": 500}
    made = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1,
            "include_dashboard": False,
            "object_store_memory": 80 << 20,
            "_system_config": settings,
        },
    )
    ray.init(address=made.address, log_to_driver=False, logging_level=logging.CRITICAL)
    yield made
    ray.shutdown()
    made.shutdown()


pytestmark = pytest.mark.slow  # nodes of one machine; what workers do in such a case is tested in test_ray_faults.py


def test_a_node_that_is_removed_costs_its_window_and_nothing_else(
    cluster: Any, small_prompts: Path, finished_store: Path, tmp_path: Path, tally: Counter
) -> None:
    node = cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
    script = Script(tmp_path / "script")
    script.at(0, "sleep 4").at(32, "sleep 4").at(64, "sleep 4")
    store, events = tmp_path / "store", list[Event]()

    def remove() -> None:
        while len({call.pid for call in script.calls}) < 2:
            time.sleep(0.05)
        cluster.remove_node(node, allow_graceful=False)

    remover = threading.Thread(target=remove)
    remover.start()
    build_small(small_prompts, store, config=through_ray(), source=ScriptedSource(script.folder), observer=events.append)
    remover.join()
    workers = [event for event in events if isinstance(event, WorkersChanged)]
    assert workers[-1].lost >= 1
    assert workers[-1].retries >= 1
    committed = [record.window for record in journal_records(store) if hasattr(record, "window")]
    assert sorted(committed) == [0, 1, 2]
    is_wrong = snapshot(store) != snapshot(finished_store)
    tally("a node removed, through Ray", losses=int(is_wrong))
    assert not is_wrong


def test_a_node_that_joins_late_takes_part(cluster: Any, small_prompts: Path, finished_store: Path, tmp_path: Path) -> None:
    """Two workers are wanted and one has room: the build goes on with it, and the other one starts when a node comes."""
    script = Script(tmp_path / "script")
    script.at(0, "sleep 8")
    store, config = tmp_path / "store", through_ray()
    # Ray adds nodes from the main thread only
    building = threading.Thread(
        target=lambda: build_small(small_prompts, store, config=config, source=ScriptedSource(script.folder))
    )
    building.start()
    while not script.calls:
        time.sleep(0.05)
    node = cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
    building.join()
    assert len({call.pid for call in script.calls}) == 2
    assert snapshot(store) == snapshot(finished_store)
    cluster.remove_node(node, allow_graceful=True)
