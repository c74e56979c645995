"""A process that stays on a node between messages, with torch imported and base model and data open.

In a deployment Flower starts a process for each message. If the node config has `warm-process` (seconds), that process
imports nothing large: it forwards the message over a Unix socket that only its own user can open.

    flower-supernode ─> flower-superexec ─> flwr-clientapp, one per message: `request`
                                                   │  handler, content, context  ─>
                                                   │  <─  content or an error message, and the state
                                            python -m clients.warm_process: `serve`

If no warm process is running, the caller starts one and hands it the listening socket, so that no message waits or
retries. A node has one warm process, for one run at a time like Ray's actors, because files may change between runs. It
ends when a message of another run arrives, `warm-process` seconds after its last answer, with the SuperExec, and when
the process that waits for its answer ends. If it dies while it handles a message, it is replaced once. It has no state
of its own: what a node caches goes back to Flower with each answer. Messages are pickled, as Flower does for Ray's
actors.
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
from flwr.supercore.logger import log

#: seconds between two checks whether the process is still needed
CHECK_SECONDS = 1.0


class NoWarmProcess(RuntimeError):
    """The node cannot have a warm process. The message is for the node's log only."""


class WarmProcessError(RuntimeError):
    """No answer from the warm process. The message may leave the node: `NodeConfig.redact_errors` has checked it."""


def request(handler: str, content: RecordDict, context: Context, idle_seconds: float) -> RecordDict:
    """Return what the warm process answers to a message, and set `context.state` to the node's new state.

    Args:
        handler: key of `clients.handlers.HANDLERS`.
        content: of the message.
        context: Flower's, of the node.
        idle_seconds: a warm process that has to be started ends so long after its last answer.

    Raises NoWarmProcess, before anything is sent, if no warm process can be reached or started; WarmProcessError if the
    handler failed, or the process died twice.
    """
    for _ in range(2):
        try:
            channel = _connect_or_start(address(), context.run_id, idle_seconds)
        except OSError as error:
            raise NoWarmProcess(str(error)) from error
        with channel, suppress(EOFError, OSError):
            channel.send((handler, content, context))
            answer, context.state = channel.recv()
            if isinstance(answer, str):
                raise WarmProcessError(answer)
            reply: RecordDict = answer
            return reply
    raise WarmProcessError(
        "the node's warm process ended without an answer; look for the reason in the node's log, and check that the "
        "node has enough memory"
    )


def address() -> Path:
    """Return the socket of the node's warm process, in a folder that only this user can open.

    Raises NoWarmProcess if others can open the folder, and OSError if it cannot be made.
    """
    folder = Path(tempfile.gettempdir()) / f"copra-fl-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) != 0o700:
        raise NoWarmProcess(f"{folder} is open to others; it must belong to this user and have mode 700")
    return folder / f"warm-{os.getppid()}"


def _connect_or_start(path: Path, run: int, idle_seconds: float) -> Connection:
    """Connect to the warm process at `path`; start one for `run` if none is listening."""
    with suppress(FileNotFoundError, ConnectionRefusedError):
        return _connect(path)
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        start(listener, os.getppid(), run, idle_seconds)
        return _connect(path)


def start(listener: socket.socket, executor: int, run: int, idle_seconds: float) -> subprocess.Popen[bytes]:
    """Start a process that calls `serve` and imports from where this one does; `executor` is a process id."""
    arguments = map(str, (listener.fileno(), executor, run, idle_seconds))
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "clients.warm_process", *arguments], pass_fds=[listener.fileno()],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, stdin=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip


def _connect(path: Path) -> Connection:
    channel = socket.socket(socket.AF_UNIX)
    try:
        channel.connect(str(path))
    except OSError:
        channel.close()
        raise
    return Connection(channel.detach())


def serve(listener: socket.socket, executor: psutil.Process, run: int, idle_seconds: float) -> None:
    """Answer the messages of `run`.

    Returns after `idle_seconds` without a message, when a message of another run arrives, or when `executor` ends.
    """
    listener.settimeout(CHECK_SECONDS)
    deadline = time.monotonic() + idle_seconds
    while executor.is_running() and time.monotonic() < deadline:
        try:
            accepted, _ = listener.accept()
        except TimeoutError:
            continue
        with Connection(accepted.detach()) as channel:
            handler, content, context = channel.recv()
            if context.run_id != run:
                listener.close()  # before the connection, because the caller connects again as soon as that ends
                return
            channel.send(_answer(channel, handler, content, context))
        deadline = time.monotonic() + idle_seconds


def _answer(
    channel: Connection, handler: str, content: RecordDict, context: Context
) -> tuple[RecordDict | str, RecordDict]:
    """Return the reply's content or an error message, and the node's new state."""
    log(INFO, "warm process %s: %s", os.getpid(), handler)
    try:
        with _exit_with_caller(channel):
            from clients.handlers import HANDLERS

            return HANDLERS[handler](content, context), context.state
    except Exception as error:
        log(ERROR, "warm process %s", os.getpid(), exc_info=error)
        return "".join(traceback.format_exception_only(error)).strip(), context.state


@contextmanager
def _exit_with_caller(channel: Connection) -> Iterator[None]:
    """Exit this process if the caller ends during the block: the next message must not wait for an unwanted answer."""
    answered = threading.Event()

    def watch() -> None:
        while not answered.wait(CHECK_SECONDS):
            if channel.poll():  # the caller sends nothing more, so this is the end of the connection
                log(WARNING, "warm process %s: the caller has ended", os.getpid())
                os._exit(1)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        answered.set()
        thread.join()


if __name__ == "__main__":
    descriptor, executor_id, run_id, warm_seconds = sys.argv[1:]
    serve(socket.socket(fileno=int(descriptor)), psutil.Process(int(executor_id)), int(run_id), float(warm_seconds))
