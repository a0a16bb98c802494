"""The admin endpoints: `dynamo.kvcache`'s controller over HTTP, for operators. Off unless asked for.

They are kept from strangers twice: with an API key it is asked for as below /v1; without one only this machine is answered,
and only under a name of this machine, so that a web page cannot reach them by pointing a name of its own here.

Every operation runs on a thread of its own pool, never on the event loop, and has a deadline. What takes long (resize,
verify, clear) is done one at a time. An operation whose client left or whose deadline passed comes to its own end.
"""

import asyncio
import ipaddress
import logging
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

from starlette.types import Scope

from dynamo.kvcache.errors import (
    CacheClosedError,
    CacheConfigError,
    CacheMemoryError,
    KVCacheError,
    OutOfBlocksError,
    PinLimitError,
    UnsupportedError,
)
from dynamo.kvcache.hashing import BlockKey
from dynamo.kvcache.status import BlockStatus, CacheStatus, Residency, Verification, block_status
from dynamo.serve.admin_bodies import (
    DEFAULT_PREFETCH_S,
    DEFAULT_TTL_S,
    DEFAULT_VERIFY_S,
    ClearAnswer,
    ClearRequest,
    ExplainRequest,
    ExtendPinAnswer,
    ExtendPinRequest,
    LookupRequest,
    PinAnswer,
    PinRequest,
    PrefetchAnswer,
    PrefetchRequest,
    PromptFields,
    ResizeAnswer,
    ResizeRequest,
    UnpinAnswer,
    VerifyRequest,
)
from dynamo.serve.envelope import shutting_down
from dynamo.serve.errors import RequestError
from dynamo.serve.prompt import chat_prompt, completion_prompts
from dynamo.serve.served_model import ServedModel
from dynamo.serve.validation import RequestDecoder

if TYPE_CHECKING:
    from dynamo.kvcache import KVCache

__all__ = ["ADMIN_PREFIX", "MAX_ADMIN_BODY_BYTES", "OPERATIONS", "CacheAdmin", "Operation", "check_local"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

ADMIN_PREFIX: Final = "/admin/"
MAX_ADMIN_BODY_BYTES: Final = 8 << 20
_NUM_THREADS = 4
_MAX_OPERATIONS = 32  # under way at the same time, waiting ones included
_SHORT_S = 30.0
_LONG_S = 600.0
_GRACE_S = 5.0  # what an operation with a deadline of its own gets in addition
_LOCAL_NAMES = ("localhost", "localhost.localdomain", "ip6-localhost")


class CacheAdmin:
    """Runs operations on one cache. All methods are called on one event loop.

    Each operation takes the decoded body and the parts of the path that vary, whether it needs them or not, and raises
    RequestError for whatever the client is to be told; `OPERATIONS` says what each does.

    Args:
        served: how prompts become tokens.
    """

    def __init__(self, cache: "KVCache", served: ServedModel) -> None:
        self._cache = cache
        self._served = served
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="dynamo-admin")
        self._num_running = 0
        self._long_operation: str | None = None

    def close(self) -> None:
        """Takes no more work. What runs ends by itself, at the latest when the cache is closed."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def status(self, body: None, place: Mapping[str, str]) -> CacheStatus:
        return await self._run(self._cache.status, _SHORT_S)

    async def lookup(self, body: LookupRequest, place: Mapping[str, str]) -> Residency:
        tokens, salt = await self._tokens(body)
        return await self._run(lambda: self._cache.lookup(tokens, salt=salt), _SHORT_S)

    async def prefetch(self, body: PrefetchRequest, place: Mapping[str, str]) -> PrefetchAnswer:
        tokens, salt = await self._tokens(body)
        timeout_s = DEFAULT_PREFETCH_S if body.timeout_s is None else body.timeout_s
        arrived = await self._run(lambda: self._cache.prefetch(tokens, salt=salt), _SHORT_S)
        # Shielded: the loads go on whoever waits, and what tells of their end must find its future as it left it.
        waiting = asyncio.shield(asyncio.wrap_future(arrived))
        try:
            async with asyncio.timeout(timeout_s):
                return PrefetchAnswer(await waiting)
        except TimeoutError:
            raise _too_late(timeout_s) from None

    async def pin(self, body: PinRequest, place: Mapping[str, str]) -> PinAnswer:
        tokens, salt = await self._tokens(body)
        ttl_s = DEFAULT_TTL_S if body.ttl_s is None else body.ttl_s
        tiers: tuple[Literal["device", "host", "disk"], ...]
        tiers = ("host", "disk") if body.tiers is None else tuple(body.tiers)
        lease = await self._run(
            lambda: self._cache.pin(tokens, salt=salt, tiers=tiers, ttl_s=ttl_s, name=body.name or ""), _SHORT_S
        )
        return PinAnswer(lease.pin_id, lease.blocks, lease.num_tokens, ttl_s)

    async def extend_pin(self, body: ExtendPinRequest, place: Mapping[str, str]) -> ExtendPinAnswer:
        pin_id = place["pin_id"]
        if not await self._run(lambda: self._cache.extend_pin(pin_id, body.ttl_s), _SHORT_S):
            raise _no_such_pin(pin_id)
        return ExtendPinAnswer(pin_id, body.ttl_s)

    async def unpin(self, body: None, place: Mapping[str, str]) -> UnpinAnswer:
        pin_id = place["pin_id"]
        if not await self._run(lambda: self._cache.unpin(pin_id), _SHORT_S):
            raise _no_such_pin(pin_id)
        return UnpinAnswer(pin_id)

    async def clear(self, body: ClearRequest, place: Mapping[str, str]) -> ClearAnswer:
        def work() -> ClearAnswer:
            self._cache.clear(None if body.tier == "all" else body.tier)
            return ClearAnswer({tier.tier: tier.num_cached_blocks for tier in self._cache.status().tiers})

        return await self._run(work, _LONG_S, long="clear")

    async def resize(self, body: ResizeRequest, place: Mapping[str, str]) -> ResizeAnswer:
        def work() -> ResizeAnswer:
            try:
                num_slots = self._cache.resize(body.tier, body.size)
            except TimeoutError as error:
                raise RequestError(f"{error}; try again when they are not", status=409, code="blocks_in_use") from error
            warning = self._cache.describe_shortage() if body.tier == "disk" else None
            return ResizeAnswer(num_slots, num_slots * self._cache.spec.layout.slot_bytes, warning)

        return await self._run(work, _LONG_S, long="resize")

    async def verify(self, body: VerifyRequest, place: Mapping[str, str]) -> Verification:
        timeout_s = DEFAULT_VERIFY_S if body.timeout_s is None else body.timeout_s
        return await self._run(lambda: self._cache.verify(timeout_s), timeout_s + _GRACE_S, long="verify")

    async def explain(self, body: ExplainRequest, place: Mapping[str, str]) -> BlockStatus:
        if body.key is not None:
            if body.prompt is not None or body.messages is not None:
                raise RequestError("send either key or a prompt", param="key", code="invalid_value")
            key = BlockKey(bytes.fromhex(body.key))
            return await self._run(lambda: block_status(key, None, self._cache.explain(key)), _SHORT_S)
        tokens, salt = await self._tokens(body)

        def work() -> BlockStatus:
            cache = self._cache
            keys = cache.block_keys(tokens, salt=salt)
            if not keys:
                raise CacheConfigError(
                    f"{len(tokens)} tokens fill no block of {cache.block_size}; send a longer prompt"
                )
            num_cached = cache.lookup(tokens, salt=salt).cached_tokens // cache.block_size
            position = min(num_cached, len(keys) - 1)
            return block_status(keys[position], position, cache.explain(keys[position]))

        return await self._run(work, _SHORT_S)

    async def _tokens(self, body: PromptFields) -> tuple[list[int], str]:
        """What a generating request with these fields would look for in the cache."""
        served = self._served
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("send exactly one of prompt and messages", param="prompt", code="invalid_value")
        if body.messages is not None:
            tokens = await chat_prompt(served.codec, body.messages, served.max_model_len)
        else:
            assert body.prompt is not None
            prompt: str | list[int | str | list[int]]
            prompt = body.prompt if isinstance(body.prompt, str) else list(body.prompt)
            (tokens,) = await completion_prompts(served.codec, prompt, served.max_model_len)
        if len(tokens) > served.max_model_len:
            raise RequestError(
                f"the prompt has {len(tokens)} tokens, and this model's maximum context length is {served.max_model_len}",
                param="prompt" if body.messages is None else "messages",
                code="context_length_exceeded",
            )
        return tokens, body.cache_salt or ""

    async def _run(self, work: Callable[[], T], timeout_s: float, *, long: str | None = None) -> T:
        """Runs `work` on a thread; whoever waits for it, it comes to its end."""
        if self._num_running >= _MAX_OPERATIONS:
            raise RequestError(
                f"{_MAX_OPERATIONS} admin operations are under way; try again in a moment",
                status=429,
                type="rate_limit_error",
                code="too_many_operations",
            )
        if long is not None and self._long_operation is not None:
            raise RequestError(
                f"{long} has to wait: {self._long_operation} is under way; try again when it has ended",
                status=409,
                code="operation_in_progress",
            )
        try:
            future = asyncio.get_running_loop().run_in_executor(self._threads, work)
        except RuntimeError:  # the threads were told to end
            raise shutting_down() from None
        self._num_running += 1
        if long is not None:
            self._long_operation = long
        future.add_done_callback(lambda done: self._ended(long))
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(future)
        except TimeoutError:
            raise _too_late(timeout_s) from None
        except KVCacheError as error:
            raise _refusal(error) from error
        finally:
            if not future.done():
                future.add_done_callback(_log_failure)

    def _ended(self, long: str | None) -> None:
        self._num_running -= 1
        if long is not None:
            self._long_operation = None


def _log_failure(abandoned: "asyncio.Future[Any]") -> None:
    """Nobody waits for the operation any more, so that what went wrong can be told to the log only."""
    if not abandoned.cancelled() and (error := abandoned.exception()) is not None:
        logger.warning("an admin operation that nobody waited for failed: %s", error)


@dataclass(frozen=True, slots=True)
class Operation:
    """One admin endpoint.

    Attributes:
        operation_id: its name in the OpenAPI document.
        body: type of the request's body; None without one.
        answer: type of the answer.
        run: takes the body and the parts of the path that vary.
        decoder: of the body.
    """

    method: str
    path: str
    operation_id: str
    summary: str
    body: type[Any] | None
    answer: type[Any]
    run: Callable[[CacheAdmin, Any, Mapping[str, str]], Awaitable[Any]]
    decoder: RequestDecoder[Any] | None


def _operation(
    method: str,
    path: str,
    name: str,
    summary: str,
    run: Callable[[CacheAdmin, Any, Mapping[str, str]], Awaitable[Any]],
    answer: type[Any],
    body: type[Any] | None = None,
) -> Operation:
    decoder = None if body is None else RequestDecoder(body)
    return Operation(method, f"/admin/cache{path}", name, summary, body, answer, run, decoder)


OPERATIONS: Final = (
    _operation("GET", "", "getCache", "Tiers, pins and what is on its way", CacheAdmin.status, CacheStatus),
    _operation(
        "POST", "/lookup", "lookup", "How much of a prompt each tier holds", CacheAdmin.lookup, Residency, LookupRequest
    ),
    _operation(
        "POST",
        "/explain",
        "explain",
        "Where a block lies and why, or why not",
        CacheAdmin.explain,
        BlockStatus,
        ExplainRequest,
    ),
    _operation(
        "POST",
        "/prefetch",
        "prefetch",
        "Bring what is cached of a prompt into device memory",
        CacheAdmin.prefetch,
        PrefetchAnswer,
        PrefetchRequest,
    ),
    _operation(
        "POST", "/pins", "pin", "Keep a prompt's blocks from being evicted", CacheAdmin.pin, PinAnswer, PinRequest
    ),
    _operation(
        "POST",
        "/pins/{pin_id}",
        "extendPin",
        "Give a pin more time",
        CacheAdmin.extend_pin,
        ExtendPinAnswer,
        ExtendPinRequest,
    ),
    _operation("DELETE", "/pins/{pin_id}", "unpin", "End a pin", CacheAdmin.unpin, UnpinAnswer),
    _operation(
        "POST", "/clear", "clear", "Drop all blocks that are not in use", CacheAdmin.clear, ClearAnswer, ClearRequest
    ),
    _operation("POST", "/resize", "resize", "Give a tier another size", CacheAdmin.resize, ResizeAnswer, ResizeRequest),
    _operation(
        "POST",
        "/verify",
        "verify",
        "Compare the blocks on disk with their digests",
        CacheAdmin.verify,
        Verification,
        VerifyRequest,
    ),
)
"""All there is; routes and the OpenAPI document are made from it."""


def check_local(scope: Scope, host_header: str) -> None:
    """Refuses clients of other machines, and names that are not this machine's: for servers without an API key.

    Raises:
        RequestError: 403.
    """
    client = scope.get("client")
    if client is None or not _is_loopback(client[0]):
        raise RequestError(
            "without an API key the admin endpoints answer this machine only; start the server with --api-key",
            status=403,
            type="permission_error",
            code="not_local",
        )
    name = host_header.rpartition("]")[0].lstrip("[") if host_header.startswith("[") else host_header.partition(":")[0]
    if name.lower() not in _LOCAL_NAMES and not _is_loopback(name):
        raise RequestError(
            f"the admin endpoints are not to be had under the name {name[:80]!r}; use 127.0.0.1 or localhost, "
            "or start the server with --api-key",
            status=403,
            type="permission_error",
            code="not_local",
        )


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _refusal(error: KVCacheError) -> RequestError:
    """What the client is told of what the cache refused."""
    match error:
        case PinLimitError():
            return RequestError(str(error), status=409, code="pin_limit")
        case OutOfBlocksError():
            return RequestError(str(error), status=409, code="out_of_blocks")
        case CacheMemoryError():
            return RequestError(str(error), status=409, param="size", code="out_of_memory")
        case UnsupportedError():
            return RequestError(str(error), code="unsupported_operation")
        case CacheConfigError():
            return RequestError(str(error), code="invalid_value")
        case CacheClosedError():
            return shutting_down()
    return RequestError(str(error), status=500, type="server_error", code="cache_error")


def _too_late(timeout_s: float) -> RequestError:
    return RequestError(
        f"the operation has not ended within {timeout_s:g} s; it goes on, and the status shows what came of it",
        status=504,
        type="server_error",
        code="deadline_exceeded",
    )


def _no_such_pin(pin_id: str) -> RequestError:
    return RequestError(
        f"there is no pin {pin_id[:80]!r}, or no longer; the status lists those there are",
        status=404,
        param="pin_id",
        code="pin_not_found",
    )
