"""Placement groups that a stopped trial leaves behind are removed.

A trial that ASHA stops loses its process, and with it Ray Train's controller. The placement group of its workers stays
until the whole job ends: Ray removes a group when the actor *and* the job that made it are gone. Ray Train has a
cleaner, but it asks the dashboard whether the controller lives, and its thread ends for good when there is no
dashboard, or when it finds several clusters on the machine; then the next trial waits for ever for CPUs that nobody
uses. What is asked for here is the control store's own record of who made a group.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import ray
from ray._private.state import state
from ray._raylet import PlacementGroupID
from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined] # made by protoc
from ray.util.placement_group import PlacementGroup, remove_placement_group

from pipelines.progress import say

EVERY_S = 1.0


def orphans() -> list[PlacementGroup]:
    """Groups of this job whose maker is dead and that still hold, or wait for, resources."""
    job = ray.get_runtime_context().get_job_id()
    records = [
        PlacementGroupTableData.FromString(r) for r in state._connect_and_get_accessor().get_placement_group_table()
    ]
    return [
        PlacementGroup(PlacementGroupID(record.placement_group_id))
        for record in records
        if record.creator_job_id.hex() == job
        and record.creator_actor_id.strip(b"\xff")  # the driver's own have none
        and record.creator_actor_dead
        and not record.is_detached
        and record.state != PlacementGroupTableData.REMOVED
    ]


@contextlib.contextmanager
def orphans_removed() -> Iterator[None]:
    """Removes them each second for as long as the block runs, and once at its end."""
    done = threading.Event()

    def remove() -> None:
        while True:
            last = done.wait(EVERY_S)
            try:
                for group in orphans():
                    remove_placement_group(group)
            except Exception as error:  # a moment without an answer must not end it: trials would wait for ever
                say(f"sweep: warning: placement groups could not be looked through: {error}")
            if last:
                return

    thread = threading.Thread(target=remove, daemon=True, name="orphaned-placement-groups")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
