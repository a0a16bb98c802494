"""Offers the blocks that a sequence has written to the tiers below, whole or layer by layer."""

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from dynamo.kvcache.device_pool import DevicePool
from dynamo.kvcache.eviction import OpenUse
from dynamo.kvcache.hashing import BlockKey
from dynamo.kvcache.layerwise import LayerSave
from dynamo.kvcache.offload import SaveRequest
from dynamo.kvcache.store import BlockStore
from dynamo.tiers.device import Fence

__all__ = ["PrefixSaver"]

_OFFER_WAIT_S = 1.0  # how long a commit waits for a full offload queue before its blocks are not offered


class PrefixSaver:
    """What one sequence offers. Used by the sequence's thread; `abandon` ends what is under way by layers.

    Args:
        pool: in which offered blocks are pinned until they are copied.
        use: what the sequence uses its blocks for.
    """

    def __init__(self, store: BlockStore, pool: DevicePool, use: OpenUse | None) -> None:
        self._store = store
        self._pool = pool
        self._use = use
        self._layers: LayerSave | None = None

    def begin_layers(self, chain: list[BlockKey], first: int, table: npt.NDArray[np.int32]) -> None:
        """Prepares to save the blocks of `chain` from `first` on, which lie where `table` says, layer by layer."""
        self._layers = self._store.begin_layers(self._request(chain, first, table, self._pool.tier.fences()))

    def save_layer(self, layer: int) -> None:
        """Copies a layer that is computed, if `begin_layers` began something. Does not wait."""
        if self._layers is not None:
            self._store.save_layer(self._layers, layer, self._pool.tier.fences())

    def save(self, chain: list[BlockKey], first: int, table: npt.NDArray[np.int32], fences: list[Fence]) -> None:
        """Offers the blocks of `chain` from `first` on, committed now; layers that were copied are not copied again.

        Waits up to a second where the tiers below are behind.

        Args:
            fences: points in CUDA streams after which the blocks are written.
        """
        if self._layers is not None and len(self._layers.chain) > len(chain):
            self.abandon()
        request = replace(self._request(chain, first, table, fences), layers=self._layers)
        self._layers = None
        self._store.save(request, _OFFER_WAIT_S)

    def abandon(self) -> None:
        """Ends what `begin_layers` began, if it has not been committed."""
        layers, self._layers = self._layers, None
        if layers is not None:
            self._store.abandon(layers)

    def _request(
        self, chain: list[BlockKey], first: int, table: npt.NDArray[np.int32], fences: list[Fence]
    ) -> SaveRequest:
        """Pins the offered blocks and those before."""
        held = table.astype(np.int64)
        pool, use = self._pool, self._use
        pool.pin(held)
        return SaveRequest(
            chain,
            first,
            held[first:],
            fences,
            release=lambda: pool.unpin(held, use.latest if use else None),
            use=use,
        )
