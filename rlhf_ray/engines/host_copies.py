"""Tensors that leave their device for host memory and come back, unnoticed by whoever holds them or views of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_CHUNK_BYTES = 256 << 20
"""Pinned memory is handed out in powers of two, so large tensors are copied in parts of this size."""


class HostCopies:
    """Storages of tensors in host memory, and the tensors' own memory given back meanwhile.

    A storage keeps its identity and every tensor its place in it, so nothing has to be told that it was away; and every
    byte comes back as it was. Between `offload` and `reload` nobody may read or write the tensors.
    """

    def __init__(self) -> None:
        self._moved: list[tuple[torch.UntypedStorage, int, list[Tensor]]] = []
        # Pinning memory is slow: parts of the same sizes are used again.
        self._spare: dict[int, list[Tensor]] = {}

    def offload(self, tensors: Iterable[Tensor], *, device: torch.device, but: Iterable[Tensor] = ()) -> None:
        """Moves the tensors that lie on `device`, but those that share their memory with `but`.

        What is away already, or belongs to a file that is mapped into memory, is left as it is.
        """
        kept = {tensor.untyped_storage()._cdata for tensor in but}
        storages = {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}
        moving = [
            storage
            for identity, storage in storages.items()
            if identity not in kept and storage.device.type == device.type and storage.nbytes() and storage.resizable()
        ]
        if not moving:
            return
        copies = [[self._copied(part) for part in _parts_of(storage)] for storage in moving]
        _synchronize(device)
        for storage, parts in zip(moving, copies, strict=True):
            self._moved.append((storage, storage.nbytes(), parts))
            storage.resize_(0)
        self._spare.clear()
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def reload(self) -> None:
        """Brings back all that is away."""
        for storage, nbytes, parts in self._moved:
            storage.resize_(nbytes)
            for target, part in zip(_parts_of(storage), parts, strict=True):
                target.copy_(part, non_blocking=True)
                self._spare.setdefault(len(part), []).append(part)
        for device in {storage.device for storage, _, _ in self._moved}:
            _synchronize(device)
        self._moved.clear()

    def _copied(self, part: Tensor) -> Tensor:
        spare = self._spare.get(len(part))
        host = spare.pop() if spare else torch.empty(len(part), dtype=torch.uint8, pin_memory=part.is_cuda)
        return host.copy_(part, non_blocking=True)


def held_tensors(*owners: Any, packages: tuple[str, ...] = ()) -> Iterator[Tensor]:
    """Every tensor that the owners hold on to: in containers, as gradients, as attributes of tensors and objects.

    Args:
        owners: tensors, containers or objects.
        packages: whose objects' attributes are looked at; those of others are not. Modules never are.
    """
    seen: dict[int, Any] = {}
    waiting = list(owners)
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        # Kept alive, so that no other object gets its id meanwhile.
        seen[id(value)] = value
        if isinstance(value, Tensor):
            yield value
            if value.is_leaf and value.grad is not None:
                waiting.append(value.grad)
            waiting += vars(value).values()
        elif isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set):
            waiting += value
        elif type(value).__module__.partition(".")[0] in packages and not isinstance(value, nn.Module | type):
            waiting += getattr(value, "__dict__", {}).values()


def _parts_of(storage: torch.UntypedStorage) -> tuple[Tensor, ...]:
    """Its bytes, in parts that are small enough to be copied into pinned memory."""
    return torch.split(torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage), _CHUNK_BYTES)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
