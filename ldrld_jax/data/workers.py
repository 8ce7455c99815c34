"""Worker processes, which make batches beside a run's process and so do not share its interpreter lock.

A worker is a fresh interpreter, not a fork, because JAX runs threads. It does not execute the run's script, and imports
JAX only if a dataset does, which then sees the CPU alone. The function that makes the batches is pickled once, into
memory that all workers map. A batch comes back in memory that the worker and the run share, so that requests are small.

A worker ends with its run, whatever ends that, and ignores the signals of a terminal or a scheduler, which the run
handles. A worker that ends before its run is an error of the run.
"""

import atexit
import collections
import contextlib
import dataclasses
import io
import itertools
import mmap
import os
import pathlib
import pickle
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

import cloudpickle
import numpy as np

from ldrld_jax.errors import UserError, as_user_error, reason

Batch = dict[str, np.ndarray]
_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
_ALIGNED = 64  # bytes


class Job:
    """A function that workers can call.

    Args:
      pool: of the workers.
      make: returns a batch; gets the arguments of `__call__`.
      source: the source that `make` reads; broken images are counted in this process by its `skip`.

    Raises:
      UserError: if they cannot be pickled.
    """

    def __init__(self, pool: "Pool", make: Callable[..., Batch], source: Any):
        self._pool, self._source, self.id = pool, source, next(_ids)
        buffers: list[Any] = []
        try:
            pickled = _dumps((make, source), buffers.append)
        except Exception as error:
            raise UserError(
                f"data.workers={len(pool)} hands the dataset to other processes, and it cannot be pickled: "
                f"{reason(error)}. Let it open files, connections and locks where it reads an example, or set "
                "data.workers=0."
            ) from error
        parts = [np.frombuffer(pickled, np.uint8), *(np.frombuffer(b.raw(), np.uint8) for b in buffers)]
        self.memory = Memory.of(parts)
        pool.jobs.add(self.id)
        weakref.finalize(self, pool.jobs.discard, self.id)

    def __call__(self, *item: Any) -> Batch:
        """Makes one batch in the next idle worker.

        Raises:
          UserError: if an image is broken, as in this process, or a worker ended.
        """
        reply, batch = self._pool.ask(self, item)
        for skipped in reply.skipped:
            self._source.skip(*skipped)
        if reply.error is not None:
            raise pickle.loads(reply.error)
        return batch


class Pool:
    """Worker processes, each of which makes one batch at a time."""

    def __init__(self, count: int):
        self.jobs: set[int] = set()  # the ids of those that are still used
        self._failure: UserError | None = None
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers = [_Worker(number) for number in range(1, count + 1)]
        for worker in self._workers:
            self._idle.put(worker)

    def __len__(self) -> int:
        return len(self._workers)

    def ask(self, job: Job, item: tuple[Any, ...]) -> "tuple[_Reply, Batch]":
        """Returns a worker's reply and a copy of its batch.

        Raises:
          UserError: if the worker has ended.
        """
        worker = self._idle.get()
        try:
            return worker.ask(job, item, self.jobs)
        except (EOFError, OSError):
            if (failure := worker.ended(len(self))) is None:
                raise
            raise self.close(failure) from None
        finally:
            self._idle.put(worker)  # one that has ended as well: the next thread is to see it

    @property
    def pids(self) -> list[int]:
        """The workers' process ids."""
        return [worker.pid for worker in self._workers]

    def describe(self) -> list[str]:
        """Returns a line for each worker that is making a batch."""
        return [line for worker in self._workers if (line := worker.describe())]

    def close(self, failure: UserError) -> UserError:
        """Ends all workers, and returns the first failure for whoever waits for one."""
        with _lock:
            self._failure = self._failure or failure
            for key in [key for key, opened in _pools.items() if opened is self]:
                del _pools[key]
        for worker in self._workers:
            worker.kill()
        return self._failure


_ids = itertools.count()
_lock = threading.Lock()
_scopes = collections.Counter[int]()  # blocks of `scope` that have not ended, by process
_pools: dict[tuple[int, int], Pool] = {}  # by process and number: a fork must not use its parent's, nor end them


def pool(count: int) -> Pool:
    """Returns the pool of `count` workers, which is started at the first call and ends with `close_all`."""
    key = (os.getpid(), count)
    with _lock:
        if key not in _pools:
            _pools[key] = Pool(count)
        return _pools[key]


@atexit.register
def close_all() -> None:
    """Ends all workers of this process."""
    with _lock:
        ours = _taken()
    _close(ours)


def _taken() -> list[Pool]:
    """Removes this process's pools from the table, while the lock is held."""
    return [_pools.pop(key) for key in list(_pools) if key[0] == os.getpid()]


def _close(pools: list[Pool]) -> None:
    for opened in pools:
        opened.close(UserError("the workers of this run have ended with it."))


@contextlib.contextmanager
def scope() -> Iterator[None]:
    """Ends all workers at the end of the block; if several blocks overlap, at the end of the last."""
    with _lock:
        _scopes[os.getpid()] += 1
    try:
        yield
    finally:
        with _lock:
            _scopes[os.getpid()] -= 1
            ours = [] if _scopes[os.getpid()] else _taken()  # at once: another block may begin
        _close(ours)


def describe() -> list[str]:
    """Returns a line for each worker that is making a batch, for the watchdog."""
    return [line for opened in list(_pools.values()) for line in opened.describe()]


@dataclasses.dataclass(frozen=True)
class _Reply:
    """A worker's reply to a request; its arrays lie in shared memory.

    Attributes:
      sizes: shape and dtype of each array.
      memory: the size of new memory, of which the descriptor follows; 0 if the arrays lie in that of the reply before.
      skipped: number, name and defect of each broken image.
      error: pickled.
    """

    sizes: dict[str, tuple[tuple[int, ...], str]] = dataclasses.field(default_factory=dict)
    memory: int = 0
    skipped: list[tuple[int, str, str]] = dataclasses.field(default_factory=list)
    error: bytes | None = None


class Memory:
    """Memory that processes share by its descriptor; it has no name that could outlive them.

    It is not in /dev/shm, which is small in containers.
    """

    def __init__(self, descriptor: int, size: int, access: int = mmap.ACCESS_WRITE):
        self.descriptor, self.sizes = descriptor, [size]
        self._map = mmap.mmap(descriptor, size, access=access)
        weakref.finalize(self, os.close, descriptor)

    @classmethod
    def sized(cls, size: int) -> "Memory":
        """Returns new memory of `size` bytes."""
        if hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("ldrld_jax")
        else:  # not on Linux
            with tempfile.TemporaryFile() as file:
                descriptor = os.dup(file.fileno())
        os.ftruncate(descriptor, size)
        return cls(descriptor, size)

    @classmethod
    def of(cls, parts: Sequence[np.ndarray]) -> "Memory":
        """Returns new memory that holds the bytes of `parts`."""
        memory = cls.sized(_total(part.nbytes for part in parts))
        memory.sizes = [part.nbytes for part in parts]
        for view, part in zip(memory.parts(memory.sizes), parts, strict=True):
            view[:] = part.reshape(-1).view(np.uint8)
        return memory

    def parts(self, sizes: Sequence[int]) -> list[np.ndarray]:
        """Returns views of uint8 of the given sizes, one after the other."""
        starts = itertools.accumulate(map(_aligned, sizes), initial=0)
        return [np.frombuffer(self._map, np.uint8, size, start) for size, start in zip(sizes, starts, strict=False)]

    def arrays(self, sizes: dict[str, tuple[tuple[int, ...], str]]) -> Batch:
        """Returns views of the given shapes and dtypes."""
        parts = self.parts([int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in sizes.values()])
        named = zip(sizes.items(), parts, strict=True)
        return {name: part.view(dtype).reshape(shape) for (name, (shape, dtype)), part in named}


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def _total(sizes: Any) -> int:
    return max(sum(map(_aligned, sizes)), 1)


class _Worker:
    """A worker process, as its parent sees it."""

    def __init__(self, number: int):
        ours, theirs = socket.socketpair()
        code = f"import sys; sys.path[:] = {sys.path!r}; from ldrld_jax.data import workers; "
        code += f"workers.work({theirs.fileno()}, {os.getpid()})"
        # A dataset's JAX must not take the memory of a GPU, nor NumPy a thread a core in each process.
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1"}
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # the process inherits that
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code], pass_fds=[theirs.fileno()], env=env, stdin=subprocess.DEVNULL
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        theirs.close()
        self.pid = self._process.pid
        self._connection = Connection(ours.detach())
        self._memory: Memory | None = None
        self._jobs: set[int] = set()
        self._number, self._since = number, 0.0  # the time of the request, 0 if idle

    def ask(self, job: Job, item: tuple[Any, ...], used: set[int]) -> tuple[_Reply, Batch]:
        self._since = time.monotonic()
        unused = self._jobs - used
        sizes = None if job.id in self._jobs else job.memory.sizes
        _send(self._connection, (job.id, sizes, unused, item))
        if sizes is not None:
            send_handle(self._connection, job.memory.descriptor, self.pid)
        self._jobs = self._jobs - unused | {job.id}
        reply = self._connection.recv()
        if reply.memory:
            self._memory = Memory(recv_handle(self._connection), reply.memory)
        batch = {key: view.copy() for key, view in self._memory.arrays(reply.sizes).items()} if self._memory else {}
        self._since = 0.0
        return reply, batch

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def ended(self, workers: int) -> UserError | None:
        """Returns the error that says how the worker ended; None if it has not."""
        try:
            code = self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            return None
        name = f"worker {self._number} of data.workers={workers} (process {self.pid})"
        if code == -signal.SIGKILL:
            return UserError(
                f"{name} was killed, probably because memory ran out. Lower data.workers or batch_size, and "
                "run the same command again: it resumes."
            )
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        return UserError(f"{name} {how}, while it read the data. Set data.workers=0 to see the error in one process.")

    def describe(self) -> str:
        if not (since := self._since):
            return ""
        seconds, pid = time.monotonic() - since, self.pid
        try:
            state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:  # it has ended just now, or the system is not Linux
            state = ""
        return f"worker {self._number} (process {pid}) has made its batch for {seconds:.0f} s" + (
            f"; it is stopped, and `kill -CONT {pid}` lets it go on." if state == "T" else "."
        )


def _send(connection: Connection, message: Any) -> None:
    """Does what `connection.send` does, which leaves a buffer in use where the other end is gone."""
    connection.send_bytes(pickle.dumps(message))


class _Pickler(cloudpickle.Pickler):
    """A pickler that pickles the code of scripts and notebooks by value, and a mapped file by its name."""

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is not np.memmap:
            return super().reducer_override(obj)
        # A part of a map does not know where it is, and what was written to a private map is not in its file.
        if obj.filename is None or obj.mode == "c" or not isinstance(obj.base, mmap.mmap):
            return obj.view(np.ndarray).__reduce_ex__(5)
        order = "C" if obj.flags.c_contiguous else "F"
        return np.memmap, (obj.filename, obj.dtype, "r", obj.offset, obj.shape, order)


def _dumps(obj: Any, buffer_callback: Callable[[pickle.PickleBuffer], Any]) -> bytes:
    file = io.BytesIO()
    _Pickler(file, protocol=5, buffer_callback=buffer_callback).dump(obj)
    return file.getvalue()


# In the worker.


def work(descriptor: int, parent: int) -> None:
    """Makes batches until the parent ends: the whole program of a worker.

    Args:
      descriptor: of the socket that leads to the parent.
      parent: its process id.
    """
    threading.Thread(target=_end_with, args=[parent], daemon=True).start()
    connection, jobs, memory = Connection(descriptor), dict[int, _Task](), Memory.sized(1)
    while True:
        try:
            job, sizes, unused, item = connection.recv()
        except (EOFError, OSError):
            return
        for other in unused:
            jobs.pop(other, None)
        if sizes is not None:
            jobs[job] = _Task(Memory(recv_handle(connection), _total(sizes), mmap.ACCESS_COPY), sizes)
        reply, batch = jobs[job](item)
        needed = _total(array.nbytes for array in batch.values())
        if grown := needed > memory.sizes[0]:
            memory = Memory.sized(needed)
        for key, view in memory.arrays(reply.sizes).items():
            view[...] = batch[key]
        try:
            _send(connection, dataclasses.replace(reply, memory=needed if grown else 0))
            if grown:
                send_handle(connection, memory.descriptor, parent)
        except OSError:
            return


def _end_with(parent: int) -> None:
    """Ends this process once its parent has ended, also in the middle of a batch."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(0)


class _Task:
    """A job, as a worker sees it: unpickled at the first call."""

    def __init__(self, memory: Memory, sizes: list[int]):
        self._memory, self._sizes = memory, sizes
        self._make: Callable[..., Batch] | None = None
        self._skipped: list[tuple[int, str, str]] = []

    def __call__(self, item: tuple[Any, ...]) -> tuple[_Reply, Batch]:
        self._skipped.clear()
        try:
            batch = self._loaded()(*item)
            sizes = {key: (array.shape, array.dtype.str) for key, array in batch.items()}
            return _Reply(sizes, skipped=list(self._skipped)), batch
        except Exception as error:
            return _Reply(skipped=list(self._skipped), error=_pickled(error)), {}

    def _loaded(self) -> Callable[..., Batch]:
        if self._make is None:
            first, *buffers = self._memory.parts(self._sizes)
            with as_user_error(
                "a worker process cannot make the dataset again",
                "Put its code where `import` finds it, or set data.workers=0.",
            ):
                self._make, source = pickle.loads(first.tobytes(), buffers=buffers)
            # The parent counts broken images, because each worker sees only some.
            object.__setattr__(source, "skip", lambda *skipped: self._skipped.append(skipped))
        assert self._make is not None
        return self._make


def _pickled(error: Exception) -> bytes:
    """Returns a pickled error, with its traceback unless it is of the user's input, whose message says all."""
    if not isinstance(error, UserError):
        error.add_note(f"In a worker process:\n{''.join(traceback.format_exception(error))}")
    try:
        pickled = cloudpickle.dumps(error)
        pickle.loads(pickled)
    except Exception:
        text = "".join(traceback.format_exception(error))
        return pickle.dumps(RuntimeError(f"a worker process failed:\n{text}"))
    return pickled
