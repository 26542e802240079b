"""Several processes watch each other, so that none waits for ever for one that died or hangs.

Each process tells every few seconds which step it is at and what it does; each hears all others. A process that falls
silent for `dead_after` seconds, or whose work does not move for `stall_after`, is named by the others in one line, with
which they exit: status 76, `ProcessLost`. So does a process that fails: the others learn why. A scheduler that starts
the same command anew on all of them continues the run.

The main thread may be inside a collective that never returns; hence threads do this, and end the process themselves.
"""

import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

from fpn_jax.errors import ProcessLost, Stopped, UserError, explain
from fpn_jax.training import processes
from fpn_jax.training.processes import KeyValues

_FOLDER = "fpn_jax/beats"
_AGAIN = "the same command, started anew on all, continues from the last checkpoint"
# What collectives (gloo, NCCL) and the coordination service say when a process at the other end is gone.
_LOST_CONNECTION = re.compile(
    r"gloo|nccl|socket closed|connection (closed|reset|refused)|UNAVAILABLE|DEADLINE_EXCEEDED|barrier|heartbeat", re.I
)


@dataclass(frozen=True)
class _Beat:
    """What a process tells of itself; `marks` counts its progress."""

    host: str
    phase: str = "starting"
    step: int = 0
    marks: int = 0
    ended: str = ""  # "done", "failed", or "left" because of what another did
    why: str = ""  # of "failed" and "left", a sentence for all
    time: float = 0.0  # wall clock, only so that no two beats are equal


@dataclass
class _Peer:
    """What was heard of a process last, and when by our own clock: those of other hosts may differ."""

    beat: _Beat
    heard: float
    moved: float


@contextlib.contextmanager
def watched(dead_after: float, stall_after: float) -> Iterator[None]:
    """Watch the others and be watched; a single process is only told of what takes longer than stall_after seconds.

    With several processes an exception does not leave this block, unless it is `Stopped`: it is printed as an entry
    point would, the others are told, and the process exits, since Python's own way out waits for them. Blocks may be
    nested; the outermost counts.
    """
    global _watch
    if _watch is not None:
        yield
        return
    _watch = _Watch(processes.key_values(), dead_after, stall_after)
    _watch.start()
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Stopped):
            _watch.failed(error)
        raise
    finally:
        _watch.stop()
        _watch = None


def at(phase: str, step: int | None = None) -> None:
    """Note what this process does from now on, for whoever has to tell where it was; also counts as progress."""
    if _watch is not None:
        _watch.at(phase, step)


def lost_connection(error: BaseException) -> bool:
    """Whether it comes of another process being gone, also where it was taken for a checkpoint that fails."""
    cause = error.__cause__ if isinstance(error, UserError) else error
    return isinstance(cause, RuntimeError | ValueError) and _LOST_CONNECTION.search(str(cause)) is not None


class _Watch:
    def __init__(self, store: KeyValues | None, dead_after: float, stall_after: float):
        self._store, self._dead_after, self._stall_after = store, dead_after, stall_after
        self._rank, self._world = (store.rank, store.world) if store else (0, 1)
        self._every = min(5.0, dead_after / 12)  # seconds between two beats
        self._mine = _Beat(socket.gethostname())
        self._peers: dict[int, _Peer] = {}
        self._answered = time.monotonic()  # when the store, which lives in rank 0, last did
        self._told_at: float | None = None  # when a peer's failure was heard of
        self._broken: tuple[float, str] | None = None  # when and how a collective failed here
        self._warned = (0, "")
        self._exchanging = threading.Lock()
        self._over = threading.Event()

    def start(self) -> None:
        self._hear(self._rank, self._mine, time.monotonic())
        if self._store is not None:
            _answer_aborts(self._store, self._last_words)
            self._exchange()
            threading.Thread(target=self._speak, daemon=True).start()
        threading.Thread(target=self._judge, daemon=True).start()

    def stop(self) -> None:
        """The others need not wait for this process any more."""
        self._mine = replace(self._mine, ended=self._mine.ended or "done")
        self._exchange()
        self._over.set()

    def at(self, phase: str, step: int | None) -> None:
        step = self._mine.step if step is None else step
        self._mine = replace(self._mine, phase=phase, step=step, marks=self._mine.marks + 1)

    def failed(self, error: BaseException) -> None:
        """End this process and let the others know why; comes back only in a process that is alone."""
        if self._store is None:
            return
        text = " ".join(str(error).split())
        if lost_connection(error):
            self._broken = time.monotonic(), text[:200]
            threading.Event().wait()  # until the judge has found who is gone, and ends the process
        told = explain(error)
        if told is None:
            traceback.print_exception(error)
        line, status = told or (f"error: {type(error).__name__}: {text}", 1)
        if told is not None:
            print(line, file=sys.stderr, flush=True)
        where = f"{self._name(self._rank)} failed at step {self._mine.step}, {self._mine.phase}"
        self._leave("failed", f"{where}: {line.removeprefix('error: ')[:500]}", status)

    # What the threads do.

    def _speak(self) -> None:
        while not self._over.wait(self._every):
            self._exchange()

    def _exchange(self) -> None:
        """Tell the others, and hear them. Blocks for as long as rank 0 does not answer."""
        if self._store is None:
            return
        with self._exchanging, contextlib.suppress(OSError):
            beat = replace(self._mine, time=time.time())
            self._store.write(f"{_FOLDER}/{self._rank}", json.dumps(asdict(beat)))
            heard = {int(rank): _Beat(**json.loads(text)) for rank, text in self._store.below(_FOLDER).items()}
            self._answered = time.monotonic()
            for rank, beat in heard.items():
                self._hear(rank, beat, self._answered)

    def _hear(self, rank: int, beat: _Beat, now: float) -> None:
        before = self._peers.get(rank)
        if before is None or (before.beat.ended and not beat.ended):
            self._peers[rank] = _Peer(beat, now, now)
        elif before.beat != beat:
            self._peers[rank] = _Peer(beat, now, now if beat.marks != before.beat.marks else before.moved)

    def _judge(self) -> None:
        while not self._over.wait(self._every):
            now = time.monotonic()
            self._hear(self._rank, replace(self._mine, time=now), now)
            if self._store is None:
                self._warn_of_stall(now)
            elif (why := self._told(now) or self._silent(now) or self._stalled(now)) and not self._mine.ended:
                me = f"this is rank {self._rank}, at step {self._mine.step}, {self._mine.phase}"
                print(f"error: {why}; {me}; {_AGAIN}", file=sys.stderr, flush=True)
                self._leave("left", why, ProcessLost.status)

    def _told(self, now: float) -> str | None:
        """What another process says of its end. If it ends all, our own main thread comes to that by itself."""
        why = next((p.beat.why for p in list(self._peers.values()) if p.beat.ended in ("failed", "left")), None)
        if why is None:
            return None
        self._told_at = self._told_at or now
        return why if self._broken or now - self._told_at > self._dead_after / 4 else None

    def _silent(self, now: float) -> str | None:
        # A collective that broke says that someone is gone: then a few beats are enough.
        limit = min(self._dead_after, max(4 * self._every, 1.0)) if self._broken else self._dead_after
        if now - self._answered > limit:
            return self._silence(0, now - self._answered)
        for rank, peer in sorted(self._peers.items()):
            if not peer.beat.ended and now - peer.heard > limit:
                return self._silence(rank, now - peer.heard)
        if self._broken and now - self._broken[0] > self._dead_after:
            return f"the connection between the processes broke, though all of them answer: {self._broken[1]}"
        return None

    def _silence(self, rank: int, seconds: float) -> str:
        peer = self._peers.get(rank)
        where = f"; it was at step {peer.beat.step}, {peer.beat.phase}" if peer else ""
        return f"{self._name(rank)} has been silent for {seconds:.0f} s, so it died or was stopped{where}"

    def _stalled(self, now: float) -> str | None:
        running = {rank: peer for rank, peer in self._peers.items() if not peer.beat.ended}
        if all(now - peer.moved <= self._stall_after for peer in running.values()):
            return None
        # All others wait for the last one, so all stand still: who is furthest behind comes first.
        order = sorted(running, key=lambda rank: (running[rank].beat.step, running[rank].moved))
        places = [f"{self._name(r)} is at step {running[r].beat.step}, {running[r].beat.phase}" for r in order[:3]]
        return f"nothing moved for {self._stall_after:.0f} s (config.stall_after): {'; '.join(places)}"

    def _warn_of_stall(self, now: float) -> None:
        mine, seconds = self._mine, now - self._peers[self._rank].moved
        if seconds > self._stall_after and self._warned != (mine.step, mine.phase):
            self._warned = mine.step, mine.phase
            what = f"warning: step {mine.step} has not moved for {seconds:.0f} s, {mine.phase}"
            print(f"{what}; if it is stuck, stop it: the same command continues", file=sys.stderr, flush=True)

    # How it ends.

    def _leave(self, ended: str, why: str, status: int) -> None:
        """Tell the others and exit; rank 0 goes last, because with it goes the store that all talk through."""
        self._mine = replace(self._mine, ended=ended, why=why)
        limit = time.monotonic() + self._dead_after / 2
        telling = threading.Thread(target=self._exchange, daemon=True)
        telling.start()
        telling.join(self._every)  # no longer: it blocks if rank 0 is gone
        while self._rank == 0 and time.monotonic() < limit and not self._all_left():
            time.sleep(self._every / 4)
        if self._rank == 0:
            time.sleep(self._every)  # who has told that it leaves has yet to do so
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    def _all_left(self) -> bool:
        now = time.monotonic()
        others = [peer for rank, peer in list(self._peers.items()) if rank != self._rank]
        return all(peer.beat.ended or now - peer.heard > 3 * self._every for peer in others)

    def _last_words(self) -> str:
        """For when jax aborts this process because rank 0, and with it the store, is gone."""
        told = next((p.beat.why for p in list(self._peers.values()) if p.beat.why), None)
        rank0 = self._peers.get(0)
        where = f"; it was last heard of at step {rank0.beat.step}, {rank0.beat.phase}" if rank0 else ""
        why = told or f"{self._name(0)} is gone, which holds all together{where}"
        me = f"this is rank {self._rank}, at step {self._mine.step}, {self._mine.phase}"
        return f"error: {why}; {me}; {_AGAIN}\n"

    def _name(self, rank: int) -> str:
        peer = self._peers.get(rank)
        return f"rank {rank} of {self._world}" + (f" (host {peer.beat.host})" if peer else "")


_watch: _Watch | None = None
_on_abort: Callable[[int], None] | None = None  # kept: C holds no reference


def _answer_aborts(store: KeyValues, last_words: Callable[[], str]) -> None:
    """When rank 0 dies, jax aborts all others at once, with a stack trace and status 134: say why, and exit with 76.

    Python's own handlers run too late, when the aborting thread has ended the process. This one runs in that thread,
    and lets the abort go on if it has another cause.
    """
    global _on_abort
    host, port = store.address.rsplit(":", 1)

    def on_abort(_: int) -> None:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
        except OSError:
            os.write(2, last_words().encode())
            os._exit(ProcessLost.status)

    if store.rank != 0:
        _on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(on_abort)
        libc = ctypes.CDLL(None)
        libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
        libc.signal(signal.SIGABRT, ctypes.cast(_on_abort, ctypes.c_void_p))
