"""What does `repsep segment` cost over doing the same by hand? Four ways over the same images on a real S3 endpoint.

    python -m benchmarks.segment [--images 1000] [--endpoint URL] [--only vit|conv] [--ways a,b,c,d]

    a  repsep segment
    b  a plain loop in one process: read with s3fs, decode, model, encode, PUT
    c  as Ray Data's documentation shows it: read_images, map_batches with an actor, write
    d  a torch DataLoader that reads and decodes, model, encode and PUT in the loop

Each with ViT-Ti/16 and the full head on images of about 512 x 512, and with a single convolution, which hides nothing.
All use the same decoder, model, encoder and one torch thread a process. Each way is a process of its own, run twice:
over 50 images and over all; rates and CPU seconds are of the difference, so that nobody's start counts. CPU seconds
are those of the whole process tree (Ray's daemons included), memory is the tree's proportional set size. Without
--endpoint it starts a Ceph RGW of its own; AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY go with --endpoint.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.meter import Meter
from benchmarks.s3_endpoint import SETUP, endpoint

SIZES = ((512, 512), (480, 640), (384, 512), (512, 683), (600, 450), (360, 480), (512, 384), (640, 640))  # H, W
LEFT_OUT = 50
COLOURS = [[37 * i % 256, 91 * i % 256, 53 * i % 256] for i in range(19)]
CLASSES = [{"id": i, "name": f"class {i}", "color": colour} for i, colour in enumerate(COLOURS)]


# --- the four ways ---------------------------------------------------------------------------------------------------


def load(model: str) -> Any:
    """The segmentor at `model`, or the single convolution."""
    import torch

    torch.set_num_threads(1)
    if model == "conv":
        return one_convolution()
    from repsep_model import load_segmentor

    return load_segmentor(model)


def one_convolution() -> Any:
    """What segment_image needs of a model, around one convolution of stride 8."""
    import torch

    class OneConvolution(torch.nn.Module):
        multiple, fixed_window, plain = 8, None, False

        def __init__(self) -> None:
            super().__init__()
            from repsep_model import SegmentorConfig

            torch.manual_seed(0)
            self.config = SegmentorConfig(backbone="vit_tiny_patch16_224", num_classes=len(CLASSES))
            self.register_buffer("mean", torch.full((3, 1, 1), 128.0))
            self.conv = torch.nn.Conv2d(3, len(CLASSES), kernel_size=8, stride=8)

        def forward_stride(self, images: Any) -> Any:
            return self.conv((images.float() - self.mean) / 60).float()

    return OneConvolution().eval()


def mask_of(model: Any, image: Any) -> bytes:
    import torch

    from repsep_model.images import encode_mask
    from repsep_model.inference import segment_image

    return encode_mask(segment_image(model, image, dtype=torch.bfloat16).labels, COLOURS)


def with_repsep(source: str, target: str, model: str) -> None:
    from pipelines.bulk import job
    from pipelines.config import Recipe
    from pipelines.segment import segment

    section: dict[str, Any] = {"source": source, "target": target, "model": model}
    if model == "conv":

        class ConvolutionActor(job.SegmentActor):
            """The real actor, with another model put in after it was made."""

            def __init__(self, model: Any, config: Any, source: str) -> None:
                super().__init__(model, config, source)
                self.segment.model = one_convolution()

        job.SegmentActor = ConvolutionActor  # type: ignore[misc]
        section["model"] = os.environ["BENCHMARK_MODEL"]
    segment(tempfile.mkdtemp(), Recipe.model_validate({"segment": section}))


def with_a_loop(source: str, target: str, model: str) -> None:
    import s3fs

    from repsep_model.images import decode_image

    net, fs = load(model), s3fs.S3FileSystem()
    root = source.removeprefix("s3://")
    for path in sorted(fs.find(root)):
        image = decode_image(fs.cat_file(path))
        key = path.removeprefix(root + "/")
        fs.pipe_file(f"{target.removeprefix('s3://')}/masks/{key}.png", mask_of(net, image))


def with_ray_data(source: str, target: str, model: str) -> None:
    """After "Image classification batch inference with PyTorch" and the guide to saving data."""
    import ray
    from pyarrow.fs import S3FileSystem

    class Predictor:
        def __init__(self) -> None:
            self.net = load(model)

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            import torch

            from repsep_model.inference import segment_image

            found = [segment_image(self.net, np.asarray(image), dtype=torch.bfloat16) for image in batch["image"]]
            masks = np.empty(len(found), object)
            masks[:] = [f.labels for f in found]
            return {"mask": masks}

    environment = {name: os.environ[name] for name in SETUP if name != "RAY_ADDRESS"}
    ray.init(runtime_env={"env_vars": environment}, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    store = S3FileSystem(endpoint_override=os.environ["AWS_ENDPOINT_URL"], region="us-east-1")
    images = ray.data.read_images(source.removeprefix("s3://"), filesystem=store, mode="RGB")
    pool = ray.data.ActorPoolStrategy(size=2)
    masks = images.map_batches(Predictor, batch_size=16, compute=pool, num_cpus=0.5)
    masks.write_images(f"{target.removeprefix('s3://')}/masks", column="mask", filesystem=store)


class StoredImages:
    """A map-style data set; each worker makes a client of its own."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = sorted(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, Any]:
        import s3fs

        from repsep_model.images import decode_image

        return self.paths[index], decode_image(s3fs.S3FileSystem().cat_file(self.paths[index]))


def with_a_data_loader(source: str, target: str, model: str) -> None:
    import s3fs
    import torch

    fs = s3fs.S3FileSystem()
    root = source.removeprefix("s3://")
    net = load(model)
    loader = torch.utils.data.DataLoader(
        StoredImages(fs.find(root)), batch_size=None, num_workers=1, prefetch_factor=16, multiprocessing_context="spawn"
    )
    for path, image in loader:
        key = path.removeprefix(root + "/")
        fs.pipe_file(f"{target.removeprefix('s3://')}/masks/{key}.png", mask_of(net, np.asarray(image)))


WAYS = {
    "a": ("repsep segment", with_repsep),
    "b": ("plain loop", with_a_loop),
    "c": ("Ray Data as documented", with_ray_data),
    "d": ("DataLoader loop", with_a_data_loader),
}


# --- measuring -------------------------------------------------------------------------------------------------------


def measure(way: str, bucket: str, model: str, count: int) -> dict[str, Any]:
    """What `count` images take more than the first few do: two runs, so that nobody's start or end counts."""
    few, all_of_them = (run(way, f"s3://{bucket}/{part}", bucket, model) for part in ("few", "in"))
    images = count - LEFT_OUT
    cpu = all_of_them["cpu_s"] - few["cpu_s"]
    return {
        "way": way,
        "images_per_s": images / (all_of_them["whole_s"] - few["whole_s"]),
        "cpu_s": cpu,
        "per_cpu_s": images / cpu,
        "peak_mib": all_of_them["peak_mib"],
        "start_s": few["whole_s"],
        "whole_s": all_of_them["whole_s"],
    }


def run(way: str, source: str, bucket: str, model: str) -> dict[str, float]:
    """One way over one prefix in a process of its own."""
    import s3fs

    target = f"{bucket}/{way}-{Path(model).name}-{secrets.token_hex(3)}"
    command = [sys.executable, __file__, "--run", way, "--source", source, "--target", f"s3://{target}"]
    with tempfile.TemporaryFile("w+") as log:
        began = time.monotonic()
        process = subprocess.Popen([*command, "--model", model], stdout=log, stderr=log, text=True)
        meter = Meter(process.pid)
        code = process.wait()
        seconds = time.monotonic() - began
        meter.stop()
        log.seek(0)
        if code != 0:
            raise SystemExit(f"{WAYS[way][0]} failed ({code}):\n{log.read()[-3000:]}")
    fs = s3fs.S3FileSystem(use_listings_cache=False)
    wanted = len(fs.find(source.removeprefix("s3://")))
    masks = [key for key in fs.find(target) if "/masks/" in key and key.endswith(".png")]
    if len(masks) != wanted:
        raise SystemExit(f"{WAYS[way][0]} left {len(masks)} masks of {wanted}")
    fs.rm(target, recursive=True)
    return {"whole_s": seconds, "cpu_s": meter.samples[-1], "peak_mib": meter.peak / 2**20}


# --- the images, the model, the table ---------------------------------------------------------------------------------


def write_images(bucket: str, count: int) -> float:
    """Generated scenes of mixed sizes as JPEGs; returns megapixels."""
    import s3fs

    from pipelines.scenes import render_scene

    fs = s3fs.S3FileSystem()
    fs.mkdir(bucket)
    scenes = [Image.fromarray(render_scene(7, i, (288, 384))[0]) for i in range(16)]
    pixels = 0
    for number in range(count):
        height, width = SIZES[number % len(SIZES)]
        out = io.BytesIO()
        scene = scenes[number * 5 % len(scenes)].resize((width, height), Image.Resampling.BICUBIC)
        scene.rotate(number % 4).save(out, "JPEG", quality=85 + number % 10)
        for part in ("in", "few") if number < LEFT_OUT else ("in",):
            fs.pipe_file(f"{bucket}/{part}/{number % 10}/{number:05d}.jpg", out.getvalue())
        pixels += height * width
    return pixels / 1e6


def write_model(folder: Path) -> str:
    import torch

    from repsep_model import SegmentorConfig, build_segmentor, save_segmentor

    torch.manual_seed(0)
    model = build_segmentor(SegmentorConfig(backbone="vit_tiny_patch16_224", num_classes=len(CLASSES)))
    classes = {"classes": CLASSES, "ignore_index": 255}
    save_segmentor(model, folder / "vit", classes=classes)
    return str(folder / "vit")


GOALS = {"vit": 0.90, "conv": 0.50}


def table(name: str, found: dict[str, dict[str, Any]]) -> None:
    print(f"\n{name}: {'way':24s} images/s   CPU s   images/CPU s   over (b)   peak MiB   start s   whole s")
    for way, line in found.items():
        ratio = f"{line['per_cpu_s'] / found['b']['per_cpu_s']:.2f}" if "b" in found else "-"
        print(
            f"{'':{len(name)}s}  {WAYS[way][0]:24s} {line['images_per_s']:8.2f} {line['cpu_s']:7.1f} "
            f"{line['per_cpu_s']:14.2f} {ratio:>10s} {line['peak_mib']:10.0f} {line['start_s']:9.1f} "
            f"{line['whole_s']:9.1f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--endpoint", help="an S3 endpoint; by default a Ceph RGW of its own")
    parser.add_argument("--only", choices=sorted(GOALS))
    parser.add_argument("--ways", default="b,a,c,d")
    parser.add_argument("--run", choices=sorted(WAYS), help=argparse.SUPPRESS)
    for name in ("source", "target", "model"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.run:
        WAYS[asked.run][1](asked.source, asked.target, asked.model)
        return
    with endpoint(asked.endpoint), tempfile.TemporaryDirectory() as folder:
        vit = os.environ["BENCHMARK_MODEL"] = write_model(Path(folder))
        bucket = f"benchmark-{secrets.token_hex(4)}"
        megapixels = write_images(bucket, asked.images)
        sizes = f"{len(SIZES)} sizes, {megapixels:.0f} megapixels"
        print(f"{asked.images} JPEGs of {sizes}; {os.cpu_count()} cores", flush=True)
        kept = True
        for name, model in {"vit": vit, "conv": "conv"}.items():
            if asked.only in (None, name):
                found = {}
                for way in asked.ways.split(","):
                    found[way] = measure(way, bucket, model, asked.images)
                    print(json.dumps(found[way]), flush=True)
                table(name, found)
                if {"a", "b"} <= found.keys():
                    ratio = found["a"]["per_cpu_s"] / found["b"]["per_cpu_s"]
                    kept &= ratio >= GOALS[name] and all(
                        found["a"]["per_cpu_s"] > found[way]["per_cpu_s"] for way in "cd" if way in found
                    )
        sys.exit(not kept)


if __name__ == "__main__":
    main()
