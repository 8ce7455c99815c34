"""Measures JPEG decoders beside Pillow: whole images, half the size, and a region; and how their pixels differ.

python benchmarks/decoders.py --turns 7

The images are those of benchmarks/data.py: 500x375, in one thread. The region is the box that `random_resized_crop`
draws. Decoders that are not installed are left out: pip install simplejpeg opencv-python-headless PyTurboJPEG
torchvision nvidia-nvimgcodec-cu12. nvImageCodec runs here without a GPU. Decoders take turns; the median of the
CPU time is reported, which other load on the machine changes little. All results are arrays, for which Pillow
copies its pixels. A difference is that of a channel of a pixel from Pillow's, in levels of 255.
"""

import argparse
import io
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np
from data import make_folder
from PIL import Image

from ldrld_jax.data.augment import generator
from ldrld_jax.data.views import crop_box

Box = tuple[int, int, int, int]  # left, top, width, height
Decode = Callable[[bytes, Box], np.ndarray]
KINDS = ("whole", "half the size", "region")


def pillow() -> dict[str, Decode]:
    def opened(data: bytes) -> Image.Image:
        return Image.open(io.BytesIO(data))

    def half(data: bytes, box: Box) -> np.ndarray:
        image = opened(data)
        image.draft(None, (image.width // 2, image.height // 2))
        return np.asarray(image)

    def region(data: bytes, box: Box) -> np.ndarray:
        left, top, width, height = box
        return np.asarray(opened(data).crop((left, top, left + width, top + height)))

    return {"whole": lambda data, box: np.asarray(opened(data)), "half the size": half, "region": region}


def simplejpeg() -> dict[str, Decode]:
    import simplejpeg

    return {
        "whole": lambda data, box: simplejpeg.decode_jpeg(data),
        "half the size": lambda data, box: simplejpeg.decode_jpeg(data, min_height=187, min_width=250, min_factor=1),
    }


def opencv() -> dict[str, Decode]:
    import cv2

    cv2.setNumThreads(1)

    def decode(data: bytes, flags: int) -> np.ndarray:
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags)

    return {
        "whole": lambda data, box: decode(data, cv2.IMREAD_COLOR_RGB),
        "half the size": lambda data, box: decode(data, cv2.IMREAD_REDUCED_COLOR_2)[..., ::-1],  # a view, from BGR
    }


def turbojpeg() -> dict[str, Decode]:
    import turbojpeg

    decoder, rgb = turbojpeg.TurboJPEG(), turbojpeg.TJPF_RGB
    return {
        "whole": lambda data, box: decoder.decode(data, pixel_format=rgb),
        "half the size": lambda data, box: decoder.decode(data, pixel_format=rgb, scaling_factor=(1, 2)),
    }


def torchvision() -> dict[str, Decode]:
    import torch
    from torchvision.io import decode_jpeg

    def whole(data: bytes, box: Box) -> np.ndarray:
        return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8)).permute(1, 2, 0).numpy()

    return {"whole": whole}


def nvimgcodec() -> dict[str, Decode]:
    from nvidia import nvimgcodec as nv

    # Only the libraries that need no GPU; the others complain on standard error.
    cpu = [nv.Backend(nv.BackendKind.CPU_ONLY)]
    decoder = nv.Decoder(backends=cpu, max_num_cpu_threads=1, device_id=nv.NVIMGCODEC_DEVICE_CPU_ONLY)

    def region(data: bytes, box: Box) -> np.ndarray:
        left, top, width, height = box
        part = nv.CodeStream(data).get_sub_code_stream(region=nv.Region(top, left, top + height, left + width))
        return np.asarray(decoder.decode(part).cpu())

    return {"whole": lambda data, box: np.asarray(decoder.decode(nv.CodeStream(data)).cpu()), "region": region}


DECODERS = {
    "Pillow": pillow,
    "simplejpeg": simplejpeg,
    "OpenCV": opencv,
    "PyTurboJPEG": turbojpeg,
    "torchvision.io": torchvision,
    "nvImageCodec": nvimgcodec,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--quality", type=int, default=97)
    parser.add_argument("--turns", type=int, default=7)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_folder(pathlib.Path(folder), args.images, args.quality)
        blobs = [path.read_bytes() for path in sorted(pathlib.Path(folder).glob("train/*/*.jpg"))]
    area, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
    boxes = [crop_box(generator(0, 0, index), 500, 375, area=area, ratio=ratio) for index in range(len(blobs))]
    contestants: dict[tuple[str, str], Decode] = {}
    for name, make in DECODERS.items():
        try:
            contestants |= {(name, kind): decode for kind, decode in make().items()}
        except (ImportError, RuntimeError) as error:
            print(f"{name} is left out: {error}")
    times: dict[tuple[str, str], list[float]] = {key: [] for key in contestants}
    for _ in range(args.turns):
        for key, decode in contestants.items():
            start = time.process_time()
            for data, box in zip(blobs, boxes, strict=True):
                decode(data, box)
            times[key].append(1e3 * (time.process_time() - start) / len(blobs))
    size = sum(map(len, blobs)) / len(blobs) / 1024
    print(f"{len(blobs)} images of {size:.0f} kB; ms an image\n{'':32}  ms   min..max     x  largest, mean difference")
    for (name, kind), spent in times.items():
        ours = contestants["Pillow", kind]
        apart = [
            np.abs(ours(*each).astype(int) - contestants[name, kind](*each).astype(int))
            for each in zip(blobs[:16], boxes[:16], strict=True)
        ]
        ms, base = statistics.median(spent), statistics.median(times["Pillow", kind])
        differ = f"{max(x.max() for x in apart):3d} {np.mean([x.mean() for x in apart]):6.3f}"
        print(f"{name:16}{kind:16}{ms:5.2f} {min(spent):5.2f}..{max(spent):<5.2f}{ms / base:6.2f}  {differ}")


if __name__ == "__main__":
    main()
