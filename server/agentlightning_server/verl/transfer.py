"""Rows -> VeRL's TransferQueue, in the shape that its V1 trainer reads.

One entry for each row, named KEY_SAMPLE_INDEX; the prompt's own entry, KEY, carries the status of its group.
Nothing is padded: VeRL packs rows itself.
"""

# pyright: reportMissingImports=false, reportUnknownMemberType=false, reportUnknownVariableType=false
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transfer_queue
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from agentlightning.types import Mode
from agentlightning_server.verl.estimator import ADVANTAGES
from agentlightning_server.verl.rows import Row


def fields_of(name: str, row: Row, *, own_advantages: bool) -> dict[str, Any]:
    """A row's entry. `uid` is what VeRL groups by: the prompt, or the row itself for our estimator."""
    prompt = torch.tensor(row.prompt_ids, dtype=torch.int64)
    response = torch.tensor(row.response_ids, dtype=torch.int64)
    mask = torch.tensor(row.response_mask, dtype=torch.int64)
    tokens = torch.cat([prompt, response])
    return {
        "uid": name if own_advantages else name.split("_", 1)[0],
        "prompts": prompt,
        "responses": response,
        "response_mask": mask,
        "loss_mask": mask.clone(),
        "input_ids": tokens,
        "position_ids": torch.arange(len(tokens), dtype=torch.int64),
        "rm_scores": torch.tensor(row.rewards, dtype=torch.float32),
        "rollout_log_probs": torch.tensor(row.logprobs, dtype=torch.float32),
        ADVANTAGES: torch.tensor(row.advantages, dtype=torch.float32),
        "num_turns": row.turns,
        "data_source": "agentlightning",
        "reward_model": {"ground_truth": None},
        "extra_fields": {"reward_extra_info": {}},
    }


def tag_of(row: Row, step: int) -> dict[str, Any]:
    """What the trainer knows of a row without reading it."""
    prompt, response = len(row.prompt_ids), len(row.response_ids)
    return {
        "status": "success",
        "prompt_len": prompt,
        "response_len": response,
        "seq_len": prompt + response,
        "global_steps": step,
        "min_global_steps": row.oldest_version,
        "max_global_steps": row.newest_version,
    }


class TransferQueueSink:
    """Puts groups where VeRL's replay buffer finds them. `own_advantages`: for our estimator, not VeRL's."""

    def __init__(self, *, own_advantages: bool) -> None:
        self._own_advantages = own_advantages
        transfer_queue.init()

    def begin(self, keys: Sequence[str], mode: Mode) -> None:
        for key in keys:
            self._tag(key, mode, "running")

    def put(self, rows: Mapping[str, Row], mode: Mode, step: int) -> None:
        own = self._own_advantages and mode is Mode.TRAIN
        entries = [fields_of(name, row, own_advantages=own) for name, row in rows.items()]
        transfer_queue.kv_batch_put(
            keys=list(rows),
            fields=list_of_dict_to_tensordict(entries),
            tags=[tag_of(row, step) for row in rows.values()],
            partition_id=_partition(mode),
        )

    def finish(self, key: str, mode: Mode, *, failed: bool) -> None:
        self._tag(key, mode, "failure" if failed else "finished")

    def _tag(self, key: str, mode: Mode, status: str) -> None:
        transfer_queue.kv_put(key=key, partition_id=_partition(mode), tag={"status": status})


def _partition(mode: Mode) -> str:
    return "val" if mode is Mode.VAL else "train"
