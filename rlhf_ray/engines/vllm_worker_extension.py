"""Methods that vLLM adds to its workers (`worker_extension_cls`): the receiving end of the weights."""

from __future__ import annotations

from typing import Any

import torch

from rlhf_ray.distributed.transports import Inbox, TransportSpec
from rlhf_ray.engines import vllm_kernels  # noqa: F401 - a worker in a process of its own is to know them too
from rlhf_ray.engines.vllm_loading import WeightLoader


class WeightReceiver:
    """Mixed into vLLM's worker class; arguments and results are of plain types, so that they pass between processes."""

    rlhf_inbox: Inbox | None = None
    rlhf_loader: WeightLoader | None = None

    def rlhf_receive(self, spec: dict[str, Any], *, first_rank: int, version: int, load: bool) -> dict[str, Any]:
        """Takes a transfer and loads it; version, digests by name, and bytes."""
        worker: Any = self
        self.rlhf_inbox = self.rlhf_inbox or Inbox()
        self.rlhf_loader = self.rlhf_loader or WeightLoader(worker)
        received = self.rlhf_inbox.take(
            TransportSpec(**spec),
            version,
            rank=first_rank + worker.rank,
            load=self.rlhf_loader.load if load else lambda arriving: None,
        )
        return {"version": received.version, "digests": received.digests, "nbytes": received.nbytes}

    def rlhf_peak_memory(self) -> int:
        """Peak bytes allocated on this worker's GPU; 0 on a CPU."""
        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
