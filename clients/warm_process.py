"""What stays on a node between messages: a process with torch imported, and with base and data open.

In a deployment Flower starts a process for each message. Where the node config has `keep-warm` (seconds), that process
imports nothing large: it hands the message on, over a Unix socket that only its own user can open.

    flower-supernode ─> flower-superexec ─> flwr-clientapp, one a message: `ask`
                                                   │  work, content, context  ─>
                                                   │  <─  content, state, or what went wrong
                                            python -m clients.warm_process: `serve`

Who finds no resident starts one, and listens in its place until it does so itself: no message waits and tries again.
A node has one resident, for one run at a time, as Ray's actors live for one run: files may change in between. It makes
way for another run's, and ends `keep-warm` seconds after its last answer, with the SuperExec, and when nobody waits for
what it works on. One that dies with a message is replaced, once. It has nothing that a new one would miss: what a node
holds goes back to Flower with each answer. Messages are pickled, as Flower does it for Ray's actors.
"""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from logging import ERROR, INFO, WARNING
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
from flwr.app import Context, RecordDict
from flwr.common.logger import log

#: between looks whether it is still wanted
LOOK_SECONDS = 1.0


class ResidentError(RuntimeError):
    """Why there is no answer, in words that may leave the node: `Site.discretion` has seen to it."""


def ask(work: str, content: RecordDict, context: Context, seconds: float) -> RecordDict:
    """What the function `work` of `clients.handlers` answers to a message of this `content`; `context.state` follows.

    A resident that has to be started stays for `seconds` after each answer. Raises ResidentError.
    """
    for _ in range(2):
        with _reach(address(), context.run_id, seconds) as resident, suppress(EOFError, OSError):
            resident.send((work, content, context))
            answer = resident.recv()
            if isinstance(answer, str):
                raise ResidentError(answer)
            content, context.state = answer
            return content
    raise ResidentError(
        "the node's resident process has ended without an answer; its log may say why, or that memory was short"
    )


def address() -> Path:
    """Of the node's resident: a socket in a folder of this user alone. Raises ResidentError where it is another's."""
    folder = Path(tempfile.gettempdir()) / f"copra-fl-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) != 0o700:
        raise ResidentError(f"{folder} is open to others; it must be a folder of this user's own, of mode 700")
    return folder / f"resident-{os.getppid()}"


def _reach(place: Path, run: int, seconds: float) -> Connection:
    """A connection to the resident at `place`, which is started for `run` where there is none."""
    with suppress(FileNotFoundError, ConnectionRefusedError):
        return _connect(place)
    place.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place))
        listener.listen()
        start(listener, os.getppid(), run, seconds)
        return _connect(place)


def start(listener: socket.socket, executor: int, run: int, seconds: float) -> subprocess.Popen[bytes]:
    """A process that does `serve`; `executor` is a process id. It imports what this one would."""
    told = map(str, (listener.fileno(), executor, run, seconds))
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "clients.warm_process", *told], pass_fds=[listener.fileno()],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, stdin=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip


def _connect(place: Path) -> Connection:
    channel = socket.socket(socket.AF_UNIX)
    try:
        channel.connect(str(place))
    except OSError:
        channel.close()
        raise
    return Connection(channel.detach())


def serve(listener: socket.socket, executor: psutil.Process, run: int, seconds: float) -> None:
    """Answer the messages of `run`, until none has come for `seconds`, one of another run has, or `executor` ends."""
    listener.settimeout(LOOK_SECONDS)
    until = time.monotonic() + seconds
    while executor.is_running() and time.monotonic() < until:
        try:
            channel, _ = listener.accept()
        except TimeoutError:
            continue
        with Connection(channel.detach()) as asker:
            work, content, context = asker.recv()
            if context.run_id != run:
                listener.close()  # first, since who asks comes again when the connection ends
                return
            answer = _answer(asker, work, content, context)
            asker.send(answer)
        until = time.monotonic() + seconds


def _answer(asker: Connection, work: str, content: RecordDict, context: Context) -> tuple[RecordDict, RecordDict] | str:
    """Content and state, or an error's words."""
    log(INFO, "resident (process %s): %s", os.getpid(), work)
    try:
        with _while_waiting(asker):
            from clients import handlers

            return getattr(handlers, work)(content, context), context.state
    except Exception as error:
        log(ERROR, "resident (process %s)", os.getpid(), exc_info=error)
        return "".join(traceback.format_exception_only(error)).strip()


@contextmanager
def _while_waiting(asker: Connection) -> Iterator[None]:
    """End this process where the one that asks ends: the next message is not to wait for an answer to nobody."""
    answered = threading.Event()

    def look() -> None:
        while not answered.wait(LOOK_SECONDS):
            if asker.poll():  # it says no more, so this is its end
                log(WARNING, "resident (process %s): nobody waits for the answer any more", os.getpid())
                os._exit(1)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        answered.set()
        thread.join()


if __name__ == "__main__":
    descriptor, pid, run_id, keep_warm = sys.argv[1:]
    serve(socket.socket(fileno=int(descriptor)), psutil.Process(int(pid)), int(run_id), float(keep_warm))
