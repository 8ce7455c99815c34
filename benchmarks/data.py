"""Measures input speed: the stream and the resident loader, against a PyTorch DataLoader with two workers.

python benchmarks/data.py --cifar_dir DIR     # the table of docs/data_speed.md; DIR holds cifar100 as TFDS prepares it
python benchmarks/data.py --memory 5000       # the process's memory while streaming batches of 16 crops
python benchmarks/data.py --threads 1 2 4     # the stream with 1, 2 and 4 threads
python benchmarks/data.py --scale             # threads beside worker processes, 1, 2, 4, ... up to the cores
python benchmarks/data.py --grain             # our worker processes beside grain's, two of each
python benchmarks/data.py --decoded           # files beside images that `--mode decode` wrote, as pixels and as JPEGs

ImageNet-style: 500x375 JPEGs in a folder, made from the two photographs that scikit-learn ships; random resized crop
to 224, flip. CIFAR-style: images decoded in memory, padded by 4, cropped and flipped. The PyTorch side reproduces
torchvision's transforms without needing torchvision: Pillow decode, crop, flip, to tensor, normalise. Our loaders
deliver uint8 and leave scaling and normalisation to the device, where XLA fuses them into the first layer;
"normalised" performs them on the host. Contestants take turns, so that other load on the machine affects all of them
equally; the median over the turns is reported. Batches of 64.

--scale also prints the CPU time an image that the run's own process spends, and how much of it its interpreter
lock can be held at most: all of it but decoding, resizing, and copying the batch of a worker, which release the lock.
"""

import argparse
import contextlib
import io
import itertools
import os
import pathlib
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from unittest import mock

import jax
import numpy as np
from PIL import Image, ImageOps

from ldrld_jax import config as config_lib
from ldrld_jax.data.augment import generator
from ldrld_jax.data.decoding import Decoding
from ldrld_jax.data.pipeline import make_train_batches
from ldrld_jax.data.speed import warm_up
from ldrld_jax.data.stream import TrainBatches
from ldrld_jax.data.views import crop_box
from ldrld_jax.data.workers import Memory
from ldrld_jax.runtime.mesh import batch_sharding, make_mesh

try:
    import torch
except ImportError:
    torch = None

BATCH = 64
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


def make_folder(root: pathlib.Path, images: int, quality: int) -> None:
    """Writes `root/train/0/*.jpg` and `root/train/1/*.jpg`, 500x375 parts of two photographs."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    for label in "01":
        (root / "train" / label).mkdir(parents=True)
    pictures = [Image.fromarray(picture) for picture in load_sample_images().images]
    for i in range(images):
        left, top = int(rng.integers(0, 90)), int(rng.integers(0, 10))
        part = pictures[i % 2].crop((left, top, left + 550, top + 412)).resize((500, 375), Image.Resampling.BICUBIC)
        part.save(root / "train" / str(i % 2) / f"{i}.jpg", quality=quality)


def to_tensor(image: Image.Image):
    """Converts like torchvision: to a contiguous float32 [3, h, w] in 0..1, then normalised in place."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    scaled = pixels.to(torch.float32).div(255)
    return scaled.sub_(torch.from_numpy(MEAN).view(3, 1, 1)).div_(torch.from_numpy(STD).view(3, 1, 1))


class Photos:
    """Endless dataset equivalent to a torchvision ImageFolder with its training transforms."""

    def __init__(self, root: pathlib.Path):
        self.paths = sorted(map(str, root.glob("train/*/*.jpg")))

    def __len__(self):
        return 10**7

    def __getitem__(self, index):
        rng = generator(0, 0, index)
        image = Image.open(self.paths[index % len(self.paths)]).convert("RGB")
        left, top, width, height = crop_box(rng, *image.size, area=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
        image = image.crop((left, top, left + width, top + height)).resize((224, 224), Image.Resampling.BILINEAR)
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return to_tensor(image), 0


class Cifar:
    """Endless dataset equivalent to torchvision's CIFAR with RandomCrop(32, padding=4) and a flip."""

    def __init__(self, images: np.ndarray):
        self.images = images

    def __len__(self):
        return 10**7

    def __getitem__(self, index):
        image = ImageOps.expand(Image.fromarray(self.images[index % len(self.images)]), 4)
        top, left, flip = np.random.randint(9), np.random.randint(9), np.random.random() < 0.5
        image = image.crop((left, top, left + 32, top + 32))
        return to_tensor(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image), 0


def torch_batches(dataset, workers: int = 2) -> Iterator:
    # Not fork: JAX already runs threads.
    options = dict(num_workers=workers, multiprocessing_context="forkserver")
    return iter(torch.utils.data.DataLoader(dataset, BATCH, shuffle=False, **options))


def normalised(batches: Iterator) -> Iterator:
    scale = jax.jit(lambda images: (images.astype(np.float32) / 255 - MEAN) / STD)
    return (jax.block_until_ready(scale(batch["image"])) for batch in batches)


def config_data(**changes):
    data = config_lib.default().data
    data.update(on_error="raise", flip=True, **changes)
    return data


def stream(threads: int, workers: int = 0, **changes) -> Iterator:
    batches = make_train_batches(config_data(**changes), batch_size=BATCH, seed=0)
    iterator = batches.iterate(threads=threads, workers=workers)
    warm_up(iterator, batches)
    return iterator


def grain_workers(count: int, **changes) -> Iterator:
    """Returns the batches of `stream`, made by worker processes of grain."""
    import grain
    from absl import flags

    flags.FLAGS.mark_as_parsed()  # grain's workers are handed them
    batches = make_train_batches(config_data(**changes), batch_size=BATCH, seed=0)
    data = grain.MapDataset.source(range(10**7)).map(batches.__getitem__)
    data = data.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))
    return iter(data.mp_prefetch(grain.multiprocessing.MultiprocessingOptions(num_workers=count)))


def processes(root: pathlib.Path, turns: int, seconds: float) -> None:
    """Prints the time to the first batch and the speed of two workers of ours and of grain's."""

    def batches() -> TrainBatches:
        return make_train_batches(config_data(**photos(root)), batch_size=BATCH, seed=0)

    makers = {
        "2 threads": lambda: batches().iterate(threads=2),
        "2 workers": lambda: batches().iterate(workers=2),
        "2 workers of grain": lambda: grain_workers(2, **photos(root)),
    }
    contestants, first, again = {}, {}, {}
    for waited in (first, again):  # as a run's second iterator does: an evaluation, or the training after it
        for name, make in makers.items():
            start = time.perf_counter()
            contestants[name] = make()
            next(contestants[name])
            waited[name] = time.perf_counter() - start
    spent: dict[str, list[float]] = {}
    rates = take_turns(contestants, turns, seconds, spent)
    print(f"{'':20}images/s   min..max     ms here  s to a first batch, again")
    for name, values in rates.items():
        cost = f"{statistics.median(spent[name]):8.3f} {first[name]:8.2f} {again[name]:6.2f}"
        print(f"{name:20}{statistics.median(values):8.0f} {min(values):7.0f}..{max(values):<6.0f} {cost}")


def resident(**changes) -> Iterator:
    sharding = batch_sharding(make_mesh(data=1))
    data = config_data(loader="resident", **changes)
    batches = make_train_batches(data, batch_size=BATCH, seed=0, sharding=sharding).iterate()
    return (jax.block_until_ready(batch) for batch in batches)


def take_turns(
    contestants: dict[str, Iterator],
    turns: int,
    seconds: float,
    spent: dict[str, list[float]] | None = None,
    held: dict[str, list[float]] | None = None,
    free: list[float] | None = None,
) -> dict[str, list[float]]:
    """Returns each contestant's images per second in each turn, without batches prefetched between turns.

    `spent` gets the milliseconds of CPU time an image in this process, and `held` those that are not in `free`,
    see `lock_free`.
    """
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(turns):
        for name, batches in contestants.items():
            # Drain the buffers first; afterwards batches arrive as fast as they are produced.
            for _ in range(24):
                next(batches)
            if free is not None:
                free.clear()
            count, start, spent_before = 0, time.perf_counter(), time.process_time()
            while (elapsed := time.perf_counter() - start) < seconds:
                next(batches)
                count += 1
            rates[name].append(count * BATCH / elapsed)
            milliseconds = 1e3 * (time.process_time() - spent_before) / count / BATCH
            if spent is not None:
                spent.setdefault(name, []).append(milliseconds)
            if held is not None and free is not None:
                held.setdefault(name, []).append(max(milliseconds - 1e3 * sum(free) / count / BATCH, 0.0))
    return rates


def show(title: str, rates: dict[str, list[float]]) -> None:
    print(f"\n{title}\n{'':36}images/s   min..max       x")
    base = statistics.median(rates["PyTorch, 2 workers"]) if "PyTorch, 2 workers" in rates else None
    for name, values in rates.items():
        ratio = f"{statistics.median(values) / base:8.2f}" if base else ""
        print(f"{name:36}{statistics.median(values):8.0f} {min(values):7.0f}..{max(values):.0f} {ratio}")


def memory(root: pathlib.Path, batches: int) -> None:
    data = photos(root)
    loader = make_train_batches(config_data(**data), batch_size=16, seed=0).iterate(threads=2)
    for step, _ in enumerate(itertools.islice(loader, batches), start=1):
        if step in (100, 500) or step % 500 == 0:
            pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
            print(f"{step:6} batches  {pages * resource.getpagesize() / 2**20:8.1f} MiB", flush=True)


def photos(root: pathlib.Path) -> dict:
    return dict(name="image_folder", data_dir=str(root), augment="random_resized_crop", crop_size=224)


def decode_share(root: pathlib.Path) -> None:
    """Prints the milliseconds that one thread spends on decoding and on cropping an image."""
    blobs = [path.read_bytes() for path in sorted(root.glob("train/*/*.jpg"))[:100]]
    sizes = f"{len(blobs)} files of {statistics.mean(map(len, blobs)) / 1024:.0f} kB on average"
    start = time.perf_counter()
    images = [Image.open(io.BytesIO(blob)).convert("RGB") for blob in blobs]
    decoded = time.perf_counter()
    for index, image in enumerate(images):
        left, top, wide, high = crop_box(generator(0, 0, index), 500, 375, area=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
        image.crop((left, top, left + wide, top + high)).resize((224, 224), Image.Resampling.BILINEAR)
    resized = time.perf_counter()
    split = (1e3 * (decoded - start) / len(blobs), 1e3 * (resized - decoded) / len(blobs))
    print(f"{sizes}: decode {split[0]:.2f} ms, crop and resize {split[1]:.2f} ms")


@contextlib.contextmanager
def lock_free() -> Iterator[list[float]]:
    """Yields a list of the seconds of CPU time of this process's threads in calls that release the lock.

    Those are decoding, resizing, and copying a batch from a worker.
    """
    spent: list[float] = []
    make_decoder, resize, arrays = Image._getdecoder, Image.Image.resize, Memory.arrays

    def timed(function):
        def call(*args, **kwargs):
            start = time.thread_time()
            result = function(*args, **kwargs)
            spent.append(time.thread_time() - start)
            return result

        return call

    class Decoder:
        def __init__(self, *args):
            self.inner = make_decoder(*args)
            self.decode = timed(self.inner.decode)

        def __getattr__(self, name):
            return getattr(self.inner, name)

    class View(np.ndarray):
        def copy(self):
            return timed(np.array)(self)

    def views(self, sizes):
        return {name: array.view(View) for name, array in arrays(self, sizes).items()}

    with contextlib.ExitStack() as stack:
        for owner, name, function in (
            (Image, "_getdecoder", Decoder),
            (Image.Image, "resize", timed(resize)),
            (Memory, "arrays", views),
        ):
            stack.enter_context(mock.patch.object(owner, name, function))
        yield spent


def scale(root: pathlib.Path, turns: int, seconds: float) -> None:
    """Prints the speed of threads and of workers, by their number, and what they cost this process."""
    cores = len(os.sched_getaffinity(0))
    counts = sorted({2**k for k in range(cores.bit_length())} | {cores})
    contestants: dict[str, Iterator] = {}
    for count in counts:
        contestants[f"{count} threads"] = stream(count, **photos(root))
        contestants[f"{count} workers"] = stream(1, count, **photos(root))
    spent: dict[str, list[float]] = {}
    held: dict[str, list[float]] = {}
    with lock_free() as free:
        rates = take_turns(contestants, turns, seconds, spent, held, free)
    print(f"{cores} cores")
    print(f"{'':12}images/s   min..max   ms an image here  of it with the lock at most  share of the time")
    for name, values in rates.items():
        here, locked, rate = (statistics.median(each) for each in (spent[name], held[name], values))
        span = f"{min(values):7.0f}..{max(values):<6.0f}"
        print(f"{name:12}{rate:8.0f} {span} {here:17.3f}{locked:29.3f}{locked * rate / 10:17.1f} %")


def decoded(root: pathlib.Path, turns: int, seconds: float) -> None:
    """Prints the speed of crops from files, from decoded pixels and from smaller JPEGs, with threads and workers."""
    from_files, sources = photos(root), {"files": photos(root)}
    for name, quality in (("pixels", None), ("JPEGs, quality 95", 95)):
        folder = root / name
        data = config_data(**from_files, resize_size=256, held_out=0.5, workers=0)  # held_out: there is no split val
        start = time.perf_counter()
        for _ in Decoding(data, str(folder), quality=quality).write():
            pass
        each = (folder / "train" / "images.bin").stat().st_size / 1024 / len(list(root.glob("train/*/*.jpg")))
        print(f"{name}: {time.perf_counter() - start:.1f} s to write, {each:.0f} kB an image")
        sources[name] = {**from_files, "name": "decoded", "data_dir": str(folder)}
    ways = {"1 thread": (1, 0), "2 threads": (2, 0), "2 workers": (1, 2)}
    contestants = {f"{name}, {way}": stream(*ways[way], **data) for way in ways for name, data in sources.items()}
    rates = take_turns(contestants, turns, seconds)
    print(f"{'':30}images/s   min..max  x of files")
    for name, values in rates.items():
        base = statistics.median(rates[f"files, {name.rpartition(', ')[2]}"])
        rate = statistics.median(values)
        print(f"{name:30}{rate:8.0f} {min(values):7.0f}..{max(values):<6.0f}{rate / base:6.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar_dir", help="the folder of TFDS's cifar100")
    parser.add_argument("--images", type=int, default=256, help="number of JPEGs")
    parser.add_argument("--quality", type=int, default=92, help="quality of the JPEGs")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="seconds of a turn")
    parser.add_argument("--threads", type=int, nargs="*", default=[2])
    parser.add_argument("--scale", action="store_true", help="threads beside worker processes, by their number")
    parser.add_argument("--grain", action="store_true", help="our worker processes beside grain's")
    parser.add_argument("--decoded", action="store_true", help="files beside decoded images")
    parser.add_argument("--memory", type=int, metavar="BATCHES", help="measure memory instead of speed")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        make_folder(root, args.images, args.quality)
        if args.memory:
            memory(root, args.memory)
            return
        if args.grain:
            processes(root, args.turns, args.seconds)
            return
        if args.decoded:
            decoded(root, args.turns, args.seconds)
            return
        if args.scale:
            scale(root, args.turns, args.seconds)
            return
        if torch is None:
            print("torch is missing: only our loaders are measured (pip install 'ldrld_jax[torch]')")
        decode_share(root)
        contestants = {} if torch is None else {"PyTorch, 2 workers": torch_batches(Photos(root))}
        contestants |= {f"stream, {n} threads": stream(n, **photos(root)) for n in args.threads}
        contestants["stream, 2 workers"] = stream(1, 2, **photos(root))
        contestants["stream, normalised"] = normalised(stream(args.threads[0], **photos(root)))
        show("ImageNet-style: 500x375 JPEG to 224x224", take_turns(contestants, args.turns, args.seconds))
        del contestants
    if args.cifar_dir is None:
        print("\nno --cifar_dir: skipping CIFAR")
        return
    cifar = dict(name="cifar100", data_dir=args.cifar_dir, pad=4)
    contestants = {f"stream, {n} threads": stream(n, **cifar) for n in args.threads}
    contestants["resident"] = resident(**cifar)
    if torch is not None:
        batches = make_train_batches(config_data(**cifar), batch_size=BATCH, seed=0)
        images, _ = batches.source.read(np.arange(10_000))
        contestants = {"PyTorch, 2 workers": torch_batches(Cifar(images))} | contestants
    show("CIFAR-style: pad 4, crop 32x32", take_turns(contestants, args.turns, args.seconds))


if __name__ == "__main__":
    main()
