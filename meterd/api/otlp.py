"""`POST /v1/traces` and `/v1/logs`: OpenTelemetry's exporters send here what models were used for.

The rule kept here: what OTLP says of its answers. 200 only after the commit, with the number of
items that are no good, which are kept as dead letters; a status that an exporter tries again (503)
only for what may succeed then; and each answer in the encoding of its request. Errors are a
`google.rpc.Status`, where the request got as far as this room: who is not let in, or speaks no
OTLP, reads a problem like everywhere else.

Exporters may compress by gzip, which nothing else in this API may: a body is unpacked no further
than a plain one might be long.
"""

from __future__ import annotations

import zlib
from collections.abc import Awaitable, Callable, Sequence
from typing import NoReturn

from aiohttp import hdrs, web

from meterd.api.events import deliveries_of
from meterd.api.parts import Parts
from meterd.api.problems import Problem
from meterd.api.settings import Scope
from meterd.api.wire import Call, printable
from meterd.bookkeeper import Recorded
from meterd.errors import Unavailable
from meterd.logs import get_logger
from meterd.otlp import answers, genai, reading
from meterd.otlp.genai import Ignored, Usage
from meterd.otlp.reading import Encoding, Signal

log = get_logger(__name__)

SOURCE = genai.SOURCE
PATHS = {Signal.TRACES: "/v1/traces", Signal.LOGS: "/v1/logs"}
GZIP = "gzip"
_GZIP_FORMAT = 31  # zlib's number for a gzip header and its largest window.
SHOWN_MAX = 3  # Rejections that an answer spells out; the dead letters have them all.
OPERATIONS_MAX = 100  # Unknown operations that are logged; a producer may invent any number.


class Otlp:
    """The room of both calls."""

    def __init__(self, parts: Parts) -> None:
        self._intake = parts.intake
        self._instruments = parts.instruments
        self._settings = parts.settings
        self._unknown: set[str] = set()  # Operations that were logged.

    def calls(self) -> list[Call]:
        """List the calls of this room."""
        return [
            Call("POST", path, Scope.INGEST, self._answerer(signal))
            for signal, path in PATHS.items()
        ]

    def _answerer(self, signal: Signal) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def answer(request: web.Request) -> web.Response:
            encoding = _encoding(request)
            try:
                body = await self._export(signal, encoding, request)
            except Problem as problem:
                return _refusal(encoding, problem.status, problem.detail)
            except Unavailable as error:
                retry_after = {"Retry-After": str(self._settings.retry_after_s)}
                return _refusal(encoding, 503, str(error), retry_after)
            return _response(encoding, 200, body)

        return answer

    async def _export(self, signal: Signal, encoding: Encoding, request: web.Request) -> bytes:
        """Record what a request tells of usage; the body of the answer."""
        body = await self._body(request)
        found = self._usages(signal, encoding, body)
        usages = [one for one in found if isinstance(one, Usage)]
        recorded = None if not usages else await self._record(usages)
        # Behind the commit: what was refused as a whole comes again, and is counted then.
        self._instruments.otlp_ignored(signal.value, len(found) - len(usages))
        unknown = sorted({one.unknown for one in found if isinstance(one, Ignored) and one.unknown})
        self._warn(unknown)
        rejected = 0 if recorded is None else len(recorded.rejections)
        said = _said(signal, recorded, unknown)
        return answers.exported(signal, encoding, rejected, said)

    def _usages(self, signal: Signal, encoding: Encoding, body: bytes) -> list[Usage | Ignored]:
        try:
            items = reading.read(
                signal,
                encoding,
                body,
                wanted=genai.WANTED,
                items_max=self._settings.events_max,
            )
        except reading.BadRequest as error:
            raise Problem(400, "not-otlp", str(error)) from None
        except reading.TooManyItems as error:
            raise Problem(413, "too-many-events", str(error)) from None
        return [genai.usage_of(item, self._settings.otlp_operations) for item in items]

    async def _record(self, usages: Sequence[Usage]) -> Recorded:
        faults = {
            index: usage.fault for index, usage in enumerate(usages) if usage.fault is not None
        }
        deliveries = deliveries_of([usage.document for usage in usages])
        deliveries.faults = {**faults, **deliveries.faults}
        return await self._intake.submit(SOURCE, deliveries)

    async def _body(self, request: web.Request) -> bytes:
        limit = self._settings.otlp_body_limit
        body = await _read(request, limit)
        if request.headers.get(hdrs.CONTENT_ENCODING, "").strip().lower() != GZIP:
            return body
        return unpacked(body, limit)

    def _warn(self, unknown: Sequence[str]) -> None:
        """Tell a person once of each operation that has tokens and is not charged."""
        for operation in unknown:
            if operation in self._unknown or len(self._unknown) >= OPERATIONS_MAX:
                continue
            self._unknown.add(operation)
            log.warning(
                "An operation that tells of tokens is not known, and not charged.",
                action="otlp_operation_unknown",
                operation=printable(operation, 100),
                next="add it to otlp.operations if it calls a model",
            )


async def _read(request: web.Request, limit: int) -> bytes:
    """Read a body of at most `limit` bytes, which is more than other calls take.

    Raises `Problem`.
    """
    if request.content.at_eof():  # There is none, or somebody has read it before.
        return await request.read()
    body = bytearray()
    async for chunk in request.content.iter_any():
        body += chunk
        if len(body) > limit:
            _too_large(limit)
    return bytes(body)


def unpacked(body: bytes, limit: int) -> bytes:
    """Unpack a gzip body of one member, at most `limit` bytes of it. Raises `Problem`.

    More members than one are refused: many small ones cost far more than they are long.
    """
    packed = zlib.decompressobj(_GZIP_FORMAT)
    try:
        plain = packed.decompress(body, limit + 1)
    except zlib.error:
        raise Problem(400, "not-gzip", "the body is no gzip, which its encoding says") from None
    if len(plain) > limit:
        _too_large(limit)
    if not packed.eof or packed.unused_data:
        raise Problem(400, "not-gzip", "the body is no whole gzip of one member")
    return plain


def _too_large(limit: int) -> NoReturn:
    detail = f"the body has more than {limit} bytes (otlp.body_limit); send smaller batches"
    raise Problem(413, "body-too-large", detail)


def _encoding(request: web.Request) -> Encoding:
    try:
        return Encoding(request.content_type)
    except ValueError:
        detail = "send OTLP as application/x-protobuf or application/json"
        raise Problem(415, "media-type", detail) from None


def _said(signal: Signal, recorded: Recorded | None, unknown: Sequence[str]) -> str:
    """Put into words what was not counted; "" where all that is usage was."""
    sentences = []
    if recorded is not None and recorded.rejections:
        rejections = sorted(recorded.rejections, key=lambda rejection: rejection.index)
        shown = "; ".join(
            f"{rejection.id or 'no id'}: {rejection.reason.value}: {rejection.detail}"
            for rejection in rejections[:SHOWN_MAX]
        )
        sentences.append(
            f"{len(rejections)} {signal.items} were rejected and are kept as dead letters"
            f" (meterd dead-letters): {shown}"
        )
    if unknown:
        names = ", ".join(printable(operation, 100) for operation in unknown[:SHOWN_MAX])
        sentences.append(
            f"tokens of operations that are not in otlp.operations are not charged: {names}"
        )
    return ". ".join(sentences)


def _response(
    encoding: Encoding, status: int, body: bytes, headers: dict[str, str] | None = None
) -> web.Response:
    return web.Response(body=body, status=status, content_type=encoding.value, headers=headers)


def _refusal(
    encoding: Encoding, status: int, message: str, headers: dict[str, str] | None = None
) -> web.Response:
    response = _response(encoding, status, answers.status(encoding, status, message), headers)
    if status == 413:
        response.force_close()  # What follows on this connection may be the rest of the body.
    return response
