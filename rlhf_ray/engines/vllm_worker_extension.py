"""Methods that vLLM adds to its workers (`worker_extension_cls`): the receiving end of the weights.

vLLM packs linear weights on a CPU, so writing into the parameters would change nothing. Everything goes through
its layerwise reload, which unpacks, loads and packs again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

from rlhf_ray.distributed.transports import Inbox, TransportSpec


class WeightReceiver:
    """Mixed into vLLM's worker class; arguments and results are of plain types, so that they pass between processes."""

    rlhf_inbox: Inbox | None = None

    def rlhf_receive(self, spec: dict[str, Any], *, first_rank: int, version: int, load: bool) -> dict[str, Any]:
        """Takes a transfer and loads it; version, digests by name, and bytes."""
        worker: Any = self
        self.rlhf_inbox = self.rlhf_inbox or Inbox()
        received = self.rlhf_inbox.take(
            TransportSpec(**spec),
            version,
            rank=first_rank + worker.rank,
            load=self._rlhf_load if load else lambda arriving: None,
        )
        return {"version": received.version, "digests": received.digests, "nbytes": received.nbytes}

    def rlhf_peak_memory(self) -> int:
        """Peak bytes allocated on this worker's GPU; 0 on a CPU."""
        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0

    def _rlhf_load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        worker: Any = self
        try:
            worker.reload_weights(weights_iterator=weights)
        except BaseException:
            # Half-loaded layers are put together again, so that the next transfer finds a whole model.
            with set_current_vllm_config(worker.vllm_config):
                finalize_layerwise_reload(worker.model_runner.get_model(), worker.model_runner.model_config)
            raise
