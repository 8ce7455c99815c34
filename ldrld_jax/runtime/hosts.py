"""Runs several processes as one: connects them, and ends all of them when one dies."""

import atexit
import collections
import contextlib
import itertools
import json
import os
import re
import secrets
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ldrld_jax.errors import UserError, first_line
from ldrld_jax.record.console import mute
from ldrld_jax.runtime.signals import Signals

# JAX's heartbeat (100 s by default) detects a vanished machine; the lifeline detects a dead process at once.
HEARTBEAT_SECONDS = 40
_TOGETHER_SECONDS = 300  # a cluster starts the processes one after another, and may pull an image first
_APART = "the processes of the run could not connect to each other"
_TOGETHER = (
    "Start all of them with the same --coordinator and --processes, or with --distributed where the cluster sets them."
)
_GRACE_SECONDS = 2.0
_GOODBYE = -1
_MESSAGE = struct.Struct("!i")

# Numbers the questions of all runs of this process: JAX ends them at one number, above all that were asked before.
_asked = itertools.count(1)


class _ErrorOfAll(UserError):
    """Error that every process raises at the same call, so that all can report it before any of them ends."""


@contextlib.contextmanager
def joined(coordinator: str | None, processes: int | None, process: int | None) -> Iterator[None]:
    """Joins this process to a multi-process run for the duration of the block; only process 0 prints.

    If a process leaves with an error, the others end too, with one line and status 1.

    Args:
      coordinator: `host:port` of process 0, the same for all. None, together with None for the other arguments,
        reads them from the cluster's environment (Slurm, Open MPI, GKE, a TPU pod).
      processes: number of processes.
      process: index of this process, from 0.

    Raises:
      UserError: if the arguments are invalid, the other processes do not connect, or have more or fewer devices.
    """
    if processes is not None and not 0 <= (process or 0) < processes:
        raise UserError(f"--process must be at least 0 and below --processes ({processes}), got {process}.")
    giving_up = threading.Timer(_TOGETHER_SECONDS, _end, [f"{_APART} within {_TOGETHER_SECONDS} s. {_TOGETHER}"])
    giving_up.start()
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            local_device_ids=_local_devices(),
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            initialization_timeout=2 * _TOGETHER_SECONDS,  # never reached: it would dump the stack
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{_APART} ({first_line(error)}). {_TOGETHER}") from error
    finally:
        giving_up.cancel()
    try:
        _check_devices()
    except _ErrorOfAll:
        jax.distributed.shutdown()  # waits for the others: JAX aborts a process whose process 0 is gone
        raise
    if not first():
        mute()
    lifeline = _Lifeline(coordinator.rpartition(":")[0] if coordinator else socket.gethostname())
    try:
        yield
    except BaseException as error:
        if isinstance(error, _ErrorOfAll) or getattr(error, "exit_code", 0) >= 128:  # signals end all processes too
            _leave(lifeline)
            raise
        if isinstance(error, jax.errors.JaxRuntimeError):  # probably a dead peer:
            time.sleep(2 * _GRACE_SECONDS)  # the lifeline reports it better, and ends this process
        lifeline.cut()
        atexit.register(exit_with, 1)  # after Python's stack trace: JAX's own end would wait for the others
        raise
    _leave(lifeline)


def _local_devices() -> list[int] | None:
    """Returns [], no restriction, for the only task of a job step on this machine; None leaves the choice to JAX.

    JAX would give each task of Slurm or Open MPI one GPU, that of the task's index on the machine.
    """
    tasks = os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") or os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    alone = re.fullmatch(r"1(\(x\d+\))?", tasks) is not None  # "1(x4)": one on each of four machines
    return [] if alone and "JAX_LOCAL_DEVICE_IDS" not in os.environ else None


def _check_devices() -> None:
    """Raises an _ErrorOfAll unless every process has as many devices, which JAX's collectives between them assume."""
    counts = collections.Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        numbers = ", ".join(str(counts[process]) for process in sorted(counts))
        raise _ErrorOfAll(f"every process needs the same number of devices; processes 0, 1, ... have {numbers}.")


def check_same(config: Mapping[str, Any]) -> None:
    """Raises an _ErrorOfAll unless all processes have the same keys and values of JSON.

    With another seed they would train different weights, and with another number of epochs wait for each other for
    ever.
    """
    if not jax.distributed.is_initialized():
        return
    text = json.dumps(config).encode()
    length = max(multihost_utils.process_allgather(np.int32(len(text))).tolist())
    texts = multihost_utils.process_allgather(np.frombuffer(text.ljust(length), np.uint8))
    first_of_all, *others = (json.loads(bytes(np.asarray(each, np.uint8))) for each in texts)
    for process, theirs in enumerate(others, 1):
        keys = [key for key in sorted(first_of_all | theirs) if first_of_all.get(key) != theirs.get(key)]
        if keys:
            differing = ", ".join(f"{key} ({first_of_all.get(key)!r} and {theirs.get(key)!r})" for key in keys)
            raise _ErrorOfAll(f"processes 0 and {process} have different configs: {differing}. Give all the same.")


def first() -> bool:
    """Returns True in process 0, which alone writes logs, configs and summaries."""
    return jax.process_index() == 0


def together(where: str) -> None:
    """Waits until every process has reached this call."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


@contextlib.contextmanager
def in_turn(what: str) -> Iterator[None]:
    """Runs the block in process 0 first and then in the others, so that process 0 can prepare data for them."""
    if not first():
        together(what)
    yield
    if first():
        together(what)


def exit_with(code: int) -> None:
    """Ends the process. In a multi-process run, a failed process does not wait for the others."""
    if code and code < 128 and jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


@contextlib.contextmanager
def catch_signals_of_all() -> Iterator[Signals]:
    """Ends all processes after the same step if any receives SIGTERM, SIGINT or a notice of preemption."""
    before = signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))  # JAX handles SIGTERM
    signals = _SignalsOfAll()
    try:
        yield signals
    finally:
        signal.signal(signal.SIGINT, before)
    signals.end()


class _SignalsOfAll(Signals):
    def stop_at(self, step: int) -> bool:
        if multihost_utils.reached_preemption_sync_point(next(_asked)):
            self.received = signal.SIGTERM
        return self.received is not None


def _end(why: str) -> None:
    """Ends the process from any thread, whatever its other threads wait for."""
    os.write(2, f"\nldrld_jax: {why}\n".encode())
    os._exit(1)


def _leave(lifeline: "_Lifeline") -> None:
    lifeline.leave()
    jax.distributed.shutdown()


class _Lifeline:
    """Connection between process 0 and each other process that breaks when one of them dies.

    A collective with a dead peer may wait for ever, and JAX's heartbeat ends it late and with a stack dump. If the
    connection cannot be made, only the heartbeat remains; and if process 0 is killed, JAX may abort the others first.
    """

    def __init__(self, host: str):
        self._ends: dict[int, socket.socket] = {}
        self._reporting = threading.Lock()  # held by the one thread that reports the death of another process
        self._failed = False  # this process reports an error of its own
        with contextlib.suppress(OSError):
            self._connect(host)
        self._watchers = [
            threading.Thread(target=self._watch, args=(peer, end), name=f"lifeline {peer}", daemon=True)
            for peer, end in self._ends.items()
        ]
        for watcher in self._watchers:
            watcher.start()

    def _connect(self, host: str) -> None:
        token, server = secrets.token_bytes(16), None
        if first():
            with contextlib.suppress(OSError):  # an address outside this machine, as behind a NAT
                server = socket.create_server((host, 0))
        with server or contextlib.nullcontext():
            port = server.getsockname()[1] if server else 0
            # Every process uses the host name of process 0, even if the name resolves differently there.
            where = np.frombuffer(_MESSAGE.pack(port) + token + host.encode().ljust(255)[:255], np.uint8)
            said = bytes(np.asarray(multihost_utils.broadcast_one_to_all(where), np.uint8))
            (port,), token, host = _MESSAGE.unpack(said[:4]), said[4:20], said[20:].decode().strip()
            if not port:
                return
            if server is None:
                end = socket.create_connection((host, port), timeout=30)
                end.sendall(token + _MESSAGE.pack(jax.process_index()))
                self._ends[0] = end
            else:
                server.settimeout(30)
                while len(self._ends) < jax.process_count() - 1:
                    end, _ = server.accept()
                    end.settimeout(30)  # a stranger may connect and say nothing
                    hello = b""
                    with contextlib.suppress(TimeoutError):
                        hello = end.recv(20, socket.MSG_WAITALL)
                    if len(hello) == 20 and secrets.compare_digest(hello[:16], token):
                        self._ends[_MESSAGE.unpack(hello[16:])[0]] = end

    def _watch(self, peer: int, end: socket.socket) -> None:
        end.settimeout(None)
        said = _message(end)
        dead = peer if said is None else said
        if said != _GOODBYE and self._reporting.acquire(blocking=False):
            self._send(dead)
            if said is not None:
                time.sleep(_GRACE_SECONDS)  # lets this process report an error common to all
            self._outlive()
            if not self._failed:
                _end(
                    f"process {dead} of {jax.process_count()} has died or failed, see its output; process "
                    f"{jax.process_index()} stops. The last checkpoint is intact: the same commands resume."
                )
        while said is not None:  # until the other process has ended
            said = _message(end)

    def _send(self, message: int) -> None:
        for end in self._ends.values():
            with contextlib.suppress(OSError):
                end.sendall(_MESSAGE.pack(message))

    def _outlive(self) -> None:
        """Waits in process 0 until the others have ended: JAX aborts those that lose it, with a stack dump."""
        until = time.monotonic() + 2 * _GRACE_SECONDS
        for watcher in self._watchers if first() else []:
            if watcher is not threading.current_thread():
                watcher.join(max(0.0, until - time.monotonic()))

    def leave(self) -> None:
        """Tells the other processes that this one has ended normally."""
        self._send(_GOODBYE)

    def cut(self) -> None:
        """Tells the other processes that this one has failed."""
        self._failed = True
        self._send(jax.process_index())
        self._outlive()


def _message(end: socket.socket) -> int | None:
    """Returns the next message; None at the end of the other process."""
    said = b""
    with contextlib.suppress(OSError):
        said = end.recv(_MESSAGE.size, socket.MSG_WAITALL)
    return _MESSAGE.unpack(said)[0] if len(said) == _MESSAGE.size else None
