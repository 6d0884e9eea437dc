"""Hosts as network namespaces, each with a cable to this machine that can be cut. Needs root."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Host:
    """A namespace; from inside, this machine has the address `gateway`."""

    name: str
    gateway: str

    def command(self, *arguments: str) -> list[str]:
        """The command that runs `arguments` on the host."""
        return ["ip", "netns", "exec", self.name, *arguments]

    def unplug(self) -> None:
        """Cut the cable."""
        _ip("link", "set", f"{self.name}-a", "down")


def available() -> bool:
    """Whether namespaces can be made here."""
    if os.getuid() or shutil.which("ip") is None:
        return False
    try:
        with host():
            return True
    except subprocess.CalledProcessError:
        return False


@contextmanager
def host() -> Generator[Host]:
    """A host for the block."""
    number = next(_numbers)
    name = f"agl{os.getpid() % 100_000}x{number}"  # interface names have at most 15 characters
    subnet = f"10.{200 + os.getpid() % 50}.{number}"
    try:
        _ip("netns", "add", name)
        _ip("link", "add", f"{name}-a", "type", "veth", "peer", "name", f"{name}-b")
        _ip("link", "set", f"{name}-b", "netns", name)
        _ip("addr", "add", f"{subnet}.1/30", "dev", f"{name}-a")
        _ip("link", "set", f"{name}-a", "up")
        _ip("-n", name, "addr", "add", f"{subnet}.2/30", "dev", f"{name}-b")
        _ip("-n", name, "link", "set", f"{name}-b", "up")
        _ip("-n", name, "link", "set", "lo", "up")
        yield Host(name, f"{subnet}.1")
    finally:
        for undo in (("link", "del", f"{name}-a"), ("netns", "del", name)):
            with suppress(subprocess.CalledProcessError):
                _ip(*undo)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
