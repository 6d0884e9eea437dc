"""`python -m agentlightning.runner MODULE:FUNCTION --server URL`: a worker process.

The first SIGTERM or Ctrl-C lets attempts finish for a while, the second ends them at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import threading

from agentlightning import context
from agentlightning.client import LightningClient
from agentlightning.errors import AgentLightningError
from agentlightning.runner.worker import GRACE_S, Worker

_ENDED = 0  # no signal has this number


def main(arguments: list[str] | None = None) -> int:
    """Run until a signal; the exit code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if not options.server or not options.key:
        print(
            f"a server and a key are needed: pass --server and --key, or set {context.ENV_URL} "
            f"and {context.ENV_KEY}",
            file=sys.stderr,
        )
        return 2
    try:
        with LightningClient(options.server, options.key) as client:
            worker = Worker(
                client,
                options.agent,
                concurrency=options.concurrency,
                isolation=options.isolation,
                grace_s=options.grace,
            )
            if options.with_parent:
                threading.Thread(target=_stop_with_parent, args=(worker,), daemon=True).start()
            _run_until_signalled(worker)
    except AgentLightningError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m agentlightning.runner", description="Run rollouts.")
    parser.add_argument("agent", help="MODULE:FUNCTION or FILE.py:FUNCTION")
    parser.add_argument("--server", default=os.environ.get(context.ENV_URL), help="URL of the server")
    parser.add_argument("--key", default=os.environ.get(context.ENV_KEY), help="key of scope runner")
    parser.add_argument("--concurrency", type=int, default=1, help="attempts at a time")
    parser.add_argument("--isolation", choices=["process", "inline"], default="process")
    parser.add_argument(
        "--grace", type=float, default=GRACE_S, help="seconds for attempts to finish at the end"
    )
    parser.add_argument(
        "--with-parent",
        action="store_true",
        help="end when standard input closes, as it does with the parent",
    )
    return parser


def _stop_with_parent(worker: Worker) -> None:
    while os.read(sys.stdin.fileno(), 4096):  # not buffered: a lock held at exit would be fatal
        pass
    worker.stop(at_once=True)


def _run_until_signalled(worker: Worker) -> None:
    """Run the worker in a thread, stop it at a signal, end it at the second. Raises what ended it early.

    Signals are read from a socket that the interpreter writes their numbers to: the kernel may hand a signal
    to any thread, and a main thread that waits for a lock would not notice; nor may a handler take locks.
    """
    news, tell = socket.socketpair()
    tell.setblocking(False)
    signal.set_wakeup_fd(tell.fileno(), warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _do_nothing)  # else they would end the process
    worker.start()
    threading.Thread(target=_tell_end, args=(worker, tell), daemon=True).start()
    at_once = False
    while (number := news.recv(1)[0]) != _ENDED:
        if number in (signal.SIGTERM, signal.SIGINT):
            worker.stop(at_once=at_once)
            at_once = True
    worker.close()


def _do_nothing(_number: int, _frame: object) -> None: ...


def _tell_end(worker: Worker, tell: socket.socket) -> None:
    worker.join()
    tell.send(bytes([_ENDED]))


if __name__ == "__main__":
    sys.exit(main())
