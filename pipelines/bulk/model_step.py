"""The model's step of bulk segmentation: decoded images -> labels and confidence."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping

import numpy as np
import torch

from pipelines.bulk.steps import Row, reason_of, worker_id
from pipelines.config import SegmentConfig
from pipelines.errors import RepsepError
from pipelines.models import load_files
from pipelines.progress import say
from repsep_model.images import UInt8
from repsep_model.inference import canvas_multiple, fill_colour, fits_whole, segment_batch, segment_image
from repsep_model.transforms import canvas


class SegmentImages:
    """Holds the model; one call at a time.

    Images of one canvas shape share a call. The model is always called with `model_batch` images, short groups padded
    with blanks, so that an image's mask does not depend on its neighbours.
    """

    def __init__(
        self,
        files: Mapping[str, bytes],
        config: SegmentConfig,
        *,
        gpu: bool = False,
        threads: int = 1,
        read: Callable[[Row], Row] | None = None,
    ) -> None:
        """`read` decodes a large image, whose row comes without pixels; `threads` are torch's on a CPU.

        Raises RepsepError if there is no such device or the model cannot be loaded.
        """
        self.config, self.read = config, read
        if gpu and not torch.cuda.is_available():
            raise RepsepError(
                "Ray gave the model a GPU, but torch sees none here (a CPU build of torch, or a driver that does not "
                "fit it); mend it, or run on CPUs with --set segment.runtime.gpu=false"
            )
        device = "cuda" if gpu else "cpu"
        if not gpu:
            torch.set_num_threads(threads)
        self.model = load_files(files).to(device)
        self.dtype = torch.bfloat16 if config.bf16 else torch.float32
        if config.compile:
            self.model.forward_stride = torch.compile(self.model.forward_stride)  # type: ignore[method-assign]

    def __call__(self, rows: list[Row]) -> list[Row]:
        """The rows, in their order, with labels and confidence in the pixels' place."""
        groups: dict[tuple[int, int], list[Row]] = defaultdict(list)
        for row in rows:
            row |= {
                "labels": None,
                "confidence": None,
                "confidence_map": None,
                "segment_s": None,
                "segmenter": worker_id(),
            }
            if row["error"] is None:
                groups[self._shape(row)].append(row)
        for shape, members in groups.items():
            size = 1 if shape == (0, 0) else self.config.model_batch
            for start in range(0, len(members), size):
                self._segment(members[start : start + size], shape)
        for row in rows:
            del row["pixels"]
        return rows

    def _shape(self, row: Row) -> tuple[int, int]:
        """The canvas's size; (0, 0) for images that go by windows, each alone."""
        if row["pixels"] is None or not fits_whole(self.model, row["height"], row["width"], self.config.pixel_budget):
            return 0, 0
        multiple = canvas_multiple(self.model)
        return tuple(-(-row[side] // multiple) * multiple for side in ("height", "width"))

    def _segment(self, rows: list[Row], shape: tuple[int, int]) -> None:
        began = time.perf_counter()
        if rows[0]["pixels"] is None:
            assert self.read is not None
            rows[0] |= self.read(rows[0])
            if rows[0]["error"]:
                return
        images = [row["pixels"] for row in rows]
        try:
            found = [self._windows(images[0])] if shape == (0, 0) else self._whole(images, shape)
        except torch.AcceleratorError as error:
            # NOTE after one of these each further call on the device fails at once: the fastest actor of all would
            # turn the bucket into failed rows. Without its process the batch is tried again on another.
            say(f"segment: the GPU failed, its process ends: {error}")
            os._exit(1)
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()
            for row in rows:
                row |= {"stage": "segment", "error": reason_of(error)}
            return
        seconds = (time.perf_counter() - began) / len(rows)
        for row, (labels, confidence) in zip(rows, found, strict=True):
            mean = float(confidence.mean(dtype=np.float64)) / 255
            kept = confidence if self.config.confidence else None
            row |= {"labels": labels, "confidence": mean, "confidence_map": kept, "segment_s": seconds}

    def _windows(self, image: UInt8) -> tuple[UInt8, UInt8]:
        found = segment_image(self.model, image, pixel_budget=0, dtype=self.dtype, as_bytes=True)
        return found.labels, found.confidence

    def _whole(self, images: list[UInt8], shape: tuple[int, int]) -> list[tuple[UInt8, UInt8]]:
        batch = np.zeros((self.config.model_batch, *shape, 3), np.uint8)
        for i, image in enumerate(images):
            batch[i] = canvas(image, canvas_multiple(self.model), fill_colour(self.model))
        tensor = torch.from_numpy(batch).permute(0, 3, 1, 2)
        sizes = [(image.shape[0], image.shape[1]) for image in images]
        found = segment_batch(self.model, tensor, sizes, dtype=self.dtype, as_bytes=True)
        return [(f.labels, f.confidence) for f in found]
