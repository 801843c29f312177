"""What MLflow could not be given while it was away: kept in the stage's folder, sent when the stage is next found done.

_UNSENT-<run>.jsonl    a line for each metric, file and description of a version
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from typing import Any

from pipelines import tracking
from pipelines.config import TrackingConfig
from pipelines.errors import RepsepError
from pipelines.progress import say
from pipelines.stage import Receipt, is_planning
from pipelines.storage import Folder

PREFIX, SUFFIX = "_UNSENT-", ".jsonl"


def keep(
    folder: Folder,
    run_id: str,
    *,
    metrics: Iterable[Any] = (),
    files: Mapping[str, bytes] | None = None,
    described: tuple[str, str, str] | None = None,
) -> None:
    """Add to what is kept in this folder: `measured` metrics, artifacts, a model version's (name, version, text)."""
    lines: list[dict[str, Any]] = [
        {"metric": {"key": m.key, "value": m.value, "timestamp": m.timestamp, "step": m.step}} for m in metrics
    ]
    lines += [{"file": name, "base64": base64.b64encode(data).decode()} for name, data in (files or {}).items()]
    lines += [{"described": described}] if described is not None else []
    name = f"{PREFIX}{run_id}{SUFFIX}"
    before = folder.read_if_present(name) or b""
    folder.write(name, before + "".join(f"{json.dumps(line)}\n" for line in lines).encode())


def send(config: TrackingConfig, receipt: Receipt) -> None:
    """Give MLflow what is kept in the folder of this stage, and end its runs. While it is away that is only said."""
    if is_planning():
        return
    for name in [entry.key for entry in receipt.folder.list(PREFIX)]:
        run_id, place = name.removeprefix(PREFIX).removesuffix(SUFFIX), receipt.folder.uri_of(name)
        try:
            _send(config, run_id, receipt.folder.read(name))
        except tracking.RefusedError as error:
            say(f"{receipt.stage}: warning: MLflow refuses {place}; if it is of no use, delete it: {error}")
        except RepsepError as error:
            say(f"{receipt.stage}: warning: {place} is still not in MLflow: {error}")
            return
        else:
            receipt.folder.delete(name)
            say(f"{receipt.stage}: MLflow has now what the run {run_id} could not write")


def _send(config: TrackingConfig, run_id: str, kept: bytes) -> None:
    lines = [json.loads(line) for line in kept.splitlines()]
    logger = tracking.RunLogger(tracking.tracking_uri(config), run_id)
    logger.write([tracking.metric_of(**line["metric"]) for line in lines if "metric" in line])
    for line in lines:
        if "file" in line:
            logger.content(base64.b64decode(line["base64"]), line["file"])
        if "described" in line:
            tracking.describe_version(config, *line["described"])
    logger.finish_if_running()
