"""Counters for whoever runs the cluster: what bulk segmentation and training have done, as Prometheus metrics of Ray.

Ray's agent on each machine exports them beside its own, as `ray_<name>_total` with the node's labels; the dashboard in
infra/monitoring draws them. Where no Ray runs nothing is counted, and nothing is made before the first count: neither
an import nor a process that only uses the library pays for them. NOTE a process hands its counts over every 10 s; what
it counted in its last moment may be lost, so totals are in a stage's receipt and report, not here.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Counted:
    """One counter by its name; `labels` are what `add` has to be given besides the amount."""

    name: str
    description: str
    labels: tuple[str, ...] = ()

    def add(self, amount: float = 1, **labels: str) -> None:
        """Count so much more, in this process. Nothing to add is no error."""
        ray: Any = sys.modules.get("ray")  # not imported here: where nobody has, no cluster can run
        if amount > 0 and ray is not None and ray.is_initialized():
            _counter(self).inc(amount, tags=labels)


IMAGES_DONE = Counted("repsep_images_done", "Images whose mask and row are committed")
IMAGES_FAILED = Counted(
    "repsep_images_failed", "Images that became a failed row, by the stage in which they failed", ("stage",)
)
BYTES_READ = Counted("repsep_bytes_read", "Encoded bytes of images that bulk segmentation has read")
BYTES_WRITTEN = Counted("repsep_bytes_written", "Encoded bytes of masks and confidences that it has written")
TRAIN_IMAGES = Counted("repsep_train_images", "Images trained on, over all workers")
TRAIN_DATA_WAIT = Counted("repsep_train_data_wait_seconds", "Seconds that training workers waited for data, summed")

ALL = (IMAGES_DONE, IMAGES_FAILED, BYTES_READ, BYTES_WRITTEN, TRAIN_IMAGES, TRAIN_DATA_WAIT)


@functools.cache
def _counter(counted: Counted) -> Any:
    """Ray's own, one for each name in a process."""
    from ray.util.metrics import Counter

    return Counter(counted.name, description=counted.description, tag_keys=counted.labels)
