"""Loading all weights into a running model of vLLM, again and again.

vLLM's own reload is right for every model: it gives each layer parameters of the form in which they are loaded, loads
them, processes them for its kernels (a CPU's linear layers are packed) and copies the outcome to where the kernels look
for it. That takes up to half as long again as the bytes need. A model that we know every layer of is reloaded so once;
from then on its weights are loaded where they stay, and memory is taken only for what a layer packs, until it has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.reload.layerwise import (
    _get_original_loader,
    finalize_layerwise_reload,
    get_layerwise_info,
    initialize_layerwise_reload,
)
from vllm.model_executor.model_loader.reload.meta import materialize_meta_tensor

_Loader = Callable[..., Any]


class WeightLoader:
    """Loads weights into the model of a worker of vLLM.

    Args:
        worker: vLLM's, with its model.
    """

    def __init__(self, worker: Any) -> None:
        self._config = worker.vllm_config
        self._model: Any = worker.model_runner.get_model()
        self._layers: list[_Layer] | None = None
        self._looked_up = _looked_up(self._model)

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Loads all weights; where that fails a part of them is loaded, and the next call finds a whole model."""
        with set_current_vllm_config(self._config), torch.no_grad():
            layers, self._layers = self._layers, None
            self._layers = self._reload(weights) if layers is None else self._load(layers, weights)

    def _reload(self, weights: Iterable[tuple[str, Tensor]]) -> list[_Layer] | None:
        """Loads in vLLM's way, and counts how often each layer is given a tensor or a part of one.

        Returns:
            What is to be processed where the next weights may be loaded in place.
        """
        given: Counter[nn.Module] = Counter()
        initialize_layerwise_reload(self._model)
        try:
            for layer in self._model.modules():
                for tensor in _parameters(layer).values():
                    if hasattr(tensor, "weight_loader"):
                        tensor.weight_loader = _counting(tensor.weight_loader, given, layer)
            self._model.load_weights(weights)
        finally:
            # Also layers that are loaded in part are put together again.
            finalize_layerwise_reload(self._model, self._config.model_config)
        if not loads_in_place(self._model):
            return None
        return [_Layer(layer, times) for layer, times in given.items() if self._is_processed(layer)]

    def _is_processed(self, layer: nn.Module) -> bool:
        return _method(layer) is not None and layer not in self._looked_up

    def _load(self, layers: list[_Layer], weights: Iterable[tuple[str, Tensor]]) -> list[_Layer] | None:
        """Loads in place; the layers, unless these weights or those that were counted lacked something.

        A sync finds out about either. What follows, like what follows a failure, is loaded in vLLM's way.
        """
        for embedding in self._looked_up:
            # What vLLM has packed of it, as if it were multiplied by, would be of the weights before.
            embedding.cpu_linear = nn.functional.linear
        with ExitStack() as stack:
            for layer in layers:
                stack.enter_context(layer.open())
            self._model.load_weights(weights)
        for module in self._model.modules():
            if type(module) is Attention:
                module.process_weights_after_loading(self._config.model_config.dtype)
        return None if any(layer.missing for layer in layers) else layers


def loads_in_place(model: nn.Module) -> bool:
    """Whether each layer keeps its parameters as they are loaded, or is one of matrices that vLLM may pack."""
    return all(_is_known(layer) for layer in model.modules())


def _is_known(layer: nn.Module) -> bool:
    method = _method(layer)
    if method is None:
        processed = hasattr(layer, "process_weights_after_loading") and type(layer) is not Attention
        return not processed and not _packed(layer)
    matrices = all(tensor.dim() <= 2 for tensor in _parameters(layer).values())
    return matrices and type(method) in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)


def _looked_up(model: nn.Module) -> set[Any]:
    """Embeddings whose rows are looked up alone, as the logits have a matrix of their own: none is to be packed."""
    modules = list(model.modules())
    has_head = any(isinstance(module, ParallelLMHead) for module in modules)
    return {module for module in modules if has_head and type(module) is VocabParallelEmbedding}


class _Layer:
    """A layer that is processed once it is loaded.

    Args:
        layer: vLLM's.
        times: how often it is given a tensor or a part of one until it is complete.

    Attributes:
        missing: how often still; below 0, how often more.
    """

    def __init__(self, layer: nn.Module, times: int) -> None:
        self._layer = layer
        self._times = times
        self.missing = 0
        self._entrances: dict[str, Any] = {}
        self._made: dict[str, Any] = {}

    @contextmanager
    def open(self) -> Iterator[None]:
        """Inside, what is loaded into the layer goes to where it stays, or is packed as soon as all of it is there."""
        kept, packed = _parameters(self._layer), _packed(self._layer)
        self.missing = self._times
        for name, tensor in kept.items():
            form = packed.get(name, tensor)
            entrance = self._entrances[name] = _twin(form)
            entrance.weight_loader = partial(self._take, name, _get_original_loader(form))
        try:
            self._layer._parameters.update(self._entrances)
            yield
        finally:
            self._layer._parameters.update(kept)
            self._entrances.clear()
            self._made.clear()

    def _take(self, name: str, loader: _Loader, param: Any, loaded: Tensor, *args: Any, **kwargs: Any) -> None:
        if not param.is_meta:
            loader(param, loaded, *args, **kwargs)
        elif self._times == 1 and _belongs(loader, self._layer) and _alike(param, loaded):
            # The whole matrix in its own form: it is packed from where it lies.
            self._made[name] = loaded
        else:
            if name not in self._made:
                with get_layerwise_info(self._layer).restore_device:
                    self._made[name] = materialize_meta_tensor(param)
            loader(self._made[name], loaded, *args, **kwargs)
        self.missing -= 1
        if not self.missing:
            self._layer._parameters.update(self._made)
            _method(self._layer).process_weights_after_loading(self._layer)
            self._layer._parameters.update(self._entrances)
            self._made.clear()


def _counting(loader: _Loader, given: Counter[nn.Module], layer: nn.Module) -> _Loader:
    # vLLM knows its own wrapper by the name, which this one has too.
    @wraps(loader)
    def counted(*args: Any, **kwargs: Any) -> Any:
        given[layer] += 1
        return loader(*args, **kwargs)

    return counted


def _belongs(loader: _Loader, layer: nn.Module) -> bool:
    """Whether the loader is the layer's own, which copies a matrix of its own form as it is."""
    return isinstance(loader, MethodType) and loader.__self__ is layer


def _method(layer: nn.Module) -> Any:
    """How the layer is processed and computed; None: as it is."""
    return getattr(layer, "quant_method", None)


def _parameters(layer: nn.Module) -> dict[str, Any]:
    """The layer's own parameters by name."""
    return {name: tensor for name, tensor in layer._parameters.items() if tensor is not None}


def _packed(layer: nn.Module) -> dict[str, Any]:
    """What the layer does not keep in the form in which it is loaded: that form, on the meta device, by name."""
    forms, kept = get_layerwise_info(layer).restore_metadata[0], _parameters(layer)
    return {name: form for name, form in forms.items() if name in kept and not _alike(kept[name], form)}


def _alike(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.dtype) == (other.shape, other.dtype)


def _twin(tensor: Any) -> Any:
    """Another parameter with the same memory: what two layers share (tied weights), each is given for itself."""
    twin = tensor.data
    twin.__class__ = tensor.__class__
    twin.__dict__ = tensor.__dict__.copy()
    return twin
