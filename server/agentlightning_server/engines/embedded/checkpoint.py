"""Checkpoints for exact resume, and export as an ordinary Hugging Face folder.

    DIR/POLICY/weights.safetensors  what learns, in float32      DIR/POLICY/optimizer.pt  moments and step
    DIR/POLICY/state.json           version, counters, and what the weights belong to

After `load`, the next update gives bitwise the weights it would have given before. A checkpoint folder is
complete or absent: it is written beside its place and renamed into it.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from agentlightning.errors import InvalidInput, NotFound

_FORMAT = 3


@dataclass(frozen=True, slots=True)
class EngineState:
    """What a checkpoint holds besides tensors. `model` and `lora_rank` say which weights fit."""

    version: int
    updates: int
    requests: int
    model: str
    lora_rank: int
    seed: int


def write(
    folder: Path, state: EngineState, weights: Mapping[str, torch.Tensor], optimizer: Mapping[str, Any]
) -> None:
    """Write one policy's part of a checkpoint."""
    folder.mkdir()
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "weights.safetensors")
    torch.save(dict(optimizer), folder / "optimizer.pt")
    (folder / "state.json").write_text(json.dumps({"format": _FORMAT, **asdict(state)}, indent=2))


def load(directory: Path, policy: str) -> tuple[EngineState, dict[str, torch.Tensor], dict[str, Any]]:
    """Read one policy's part of a checkpoint.

    Raises NotFound when there is no checkpoint, InvalidInput for a damaged one or one without the policy.
    """
    found = sorted(file.parent.name for file in directory.glob("*/state.json"))
    if (directory / "state.json").is_file():
        raise InvalidInput(f"the checkpoint in {directory} was written by another version of this program")
    if not found:
        raise NotFound(f"there is no checkpoint in {directory}")
    if policy not in found:
        raise InvalidInput(
            f"the checkpoint in {directory} has no policy {policy!r}, but {', '.join(found)}: start the "
            "engine with the checkpoint's policies"
        )
    try:
        return _read(directory / policy)
    except InvalidInput:
        raise
    except Exception as error:  # each of the three readers has errors of its own kind
        raise InvalidInput(
            f"the checkpoint in {directory} is damaged ({error}): choose another one, or start anew in "
            "another folder"
        ) from error


def _read(directory: Path) -> tuple[EngineState, dict[str, torch.Tensor], dict[str, Any]]:
    fields: dict[str, Any] = json.loads((directory / "state.json").read_text())
    if fields.pop("format", None) != _FORMAT:
        raise InvalidInput(f"the checkpoint in {directory} was written by another version of this program")
    weights = load_file(directory / "weights.safetensors")
    optimizer: dict[str, Any] = torch.load(directory / "optimizer.pt", weights_only=True, map_location="cpu")
    return EngineState(**fields), weights, optimizer


def write_folder(directory: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new folder, then put it at `directory` in place of what was there."""
    directory = directory.absolute()
    directory.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        write(fresh)
        fresh.chmod(0o755)  # mkdtemp makes it private
        if directory.exists():
            old = fresh.with_name(fresh.name + ".old")
            directory.rename(old)
            fresh.rename(directory)
            shutil.rmtree(old)
        else:
            fresh.rename(directory)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
