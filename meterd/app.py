"""The composition root: the one file that knows all others. Open, wire, run, drain.

It keeps one rule: whatever stops a part stops the whole, with a name, and the next start begins
from the disk. Two stops: the first signal drains (read no more, commit, ack, settle what is due),
the second or a failed commit ends at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from prometheus_client import CollectorRegistry

from meterd import __version__, api, config, logs
from meterd.bookkeeper import Bookkeeper
from meterd.config.settings import MqttSourceSettings, RedisSourceSettings, Settings
from meterd.core.changes import State
from meterd.core.events import EventDecoder
from meterd.core.keys import Keys
from meterd.core.ledger import Conflict, Ledger
from meterd.core.money import MICROS, format_amount, format_exact
from meterd.core.plans import Plan
from meterd.core.sequences import Sequences
from meterd.errors import (
    ConfigurationError,
    InvariantBroken,
    MeterdError,
    Mistake,
    Refused,
    StoreCorrupt,
    StoreFailed,
)
from meterd.escrow.client import EscrowApi, EscrowClient, EscrowPaths
from meterd.escrow.service import OpeningService, PaymentService
from meterd.escrow.wallet import WalletApi, WalletClient, WalletPaths
from meterd.intake import Intake
from meterd.listening import Certificate, CertificateFiles, leave, listen_on
from meterd.logs import get_logger
from meterd.metrics import Metrics, Reads
from meterd.opener import Opener, Terms
from meterd.parts import (
    agreements_of,
    discoveries_of,
    meters_of,
    plans_of,
    producers_of,
    rules_of,
)
from meterd.receipts import KEY_NAME, Notary, key_in
from meterd.settler import Pace, Settler
from meterd.sources import Source
from meterd.store.restore import Restored, restore
from meterd.store.sqlite import SqliteStore
from meterd.supervision import READY, STOPPING, Supervision

log = get_logger(__name__)

TIDY_INTERVAL_S = 60.0
LAG_INTERVAL_S = 2.0
# Containers made and not freed before the collector looks: those of a few large batches.
GARBAGE_YOUNG_MAX = 100_000
# The store's thread wants the interpreter back after each statement. At the usual 5 ms it waits
# longer for it, behind a busy event loop, than a whole commit takes.
SWITCH_INTERVAL_S = 0.0005
REQUESTS_TIMEOUT_S = 5.0  # For requests under way when meterd stops.


class SystemClock:
    """The clocks of this machine."""

    def mono(self) -> float:
        """Seconds that only grow."""
        return time.monotonic()

    def wall(self) -> int:
        """Milliseconds since the epoch."""
        return time.time_ns() // 1_000_000


# -- From settings to parts
# ----------------------------------------------------------------------------------------


def pace_of(settings: Settings) -> Pace:
    """Make the settler's pace."""
    escrow = settings.escrow
    return Pace(
        concurrency=escrow.concurrency,
        doubts_max=escrow.doubts_max,
        doubts_window=escrow.doubts_window.ms / 1000,
    )


def escrow_api_of(settings: Settings) -> EscrowApi:
    """Make the address of the escrow service."""
    escrow = settings.escrow
    return EscrowApi(
        base_url=escrow.base_url,
        api_key=escrow.api_key.reveal(),
        paths=EscrowPaths(
            status=escrow.paths.status,
            list=escrow.paths.list,
            release_partial=escrow.paths.release_partial,
            create=escrow.paths.create,
            release=escrow.paths.release,
            refund=escrow.paths.refund,
        ),
        idempotency_header=escrow.idempotency_header,
        request_timeout_s=escrow.request_timeout.seconds,
        connections_max=escrow.concurrency * 2,
    )


def payer_api_of(settings: Settings) -> EscrowApi:
    """Make the address of the escrow service for whoever locks: the payer, where his key is."""
    escrow = settings.escrow
    return replace(
        escrow_api_of(settings), api_key=(escrow.payer_api_key or escrow.api_key).reveal()
    )


def terms_of(settings: Settings) -> Terms:
    """Make the terms on which escrows are locked and found."""
    escrow = settings.escrow
    return Terms(
        agent_id=escrow.agent_id,
        payer_key=escrow.payer_api_key is not None,
        patterns=tuple(discoveries_of(settings)),
        discover_interval=escrow.discover_interval.ms / 1000,
    )


def wallet_api_of(settings: Settings) -> WalletApi:
    """Make the address of the wallets' service: the escrow service, unless it says otherwise."""
    escrow, wallet = settings.escrow, settings.wallet
    return WalletApi(
        base_url=wallet.base_url or escrow.base_url,
        api_key=(wallet.api_key or escrow.api_key).reveal(),
        paths=WalletPaths(debit=wallet.paths.debit, status=wallet.paths.status),
        idempotency_header=escrow.idempotency_header,
        request_timeout_s=escrow.request_timeout.seconds,
        connections_max=escrow.concurrency * 2,
        minimum_micros=wallet.minimum_micros,
    )


def api_settings_of(settings: Settings) -> api.ApiSettings:
    """Make the limits and tokens of the HTTP API."""
    tokens = tuple(
        api.ApiToken(
            entry.name, entry.token.reveal(), frozenset(api.Scope(scope) for scope in entry.scopes)
        )
        for entry in settings.http.tokens
    )
    return api.ApiSettings(
        tokens=tokens,
        body_limit=settings.http.body_limit_bytes,
        otlp_operations=frozenset(map(str.lower, settings.otlp.operations)),
        otlp_body_limit=settings.otlp.body_limit_bytes,
    )


def certificate_files_of(settings: Settings) -> CertificateFiles | None:
    """Name the files of the certificate that the HTTP API shows; None: it speaks no TLS."""
    cert, key = settings.http.tls_cert_file, settings.http.tls_key_file
    return None if cert is None or key is None else CertificateFiles(cert, key)


def _needing_restart(settings: Settings, name: str) -> object:
    """The part of a table that no reload takes; another certificate is shown at once."""
    if name == "http" and settings.http.speaks_tls:
        shown = {"tls_cert_file": Path(), "tls_key_file": Path()}
        return settings.http.model_copy(update=shown)
    return getattr(settings, name)


def source_of(entry: RedisSourceSettings | MqttSourceSettings) -> Source:
    """Make one source.

    The library of the other kind is not even imported: a start should be quick.
    """
    if isinstance(entry, RedisSourceSettings):
        from meterd.sources.redis_streams import RedisStreamSettings, RedisStreamSource

        return RedisStreamSource(
            RedisStreamSettings(
                name=entry.name,
                url=entry.url.reveal(),
                stream=entry.stream,
                group=entry.group,
                mode=entry.mode,
                batch=entry.batch,
                block_ms=entry.block.ms,
            )
        )
    from meterd.sources.mqtt import MqttSettings, MqttSource

    return MqttSource(
        MqttSettings(
            name=entry.name,
            host=entry.host,
            port=entry.port,
            topic=entry.topic,
            client_id=entry.client_id,
            protocol=entry.protocol,
            username=entry.username,
            password="" if entry.password is None else entry.password.reveal(),
            tls=entry.tls,
            tls_ca_file=str(entry.ca_file or ""),
            tls_cert_file=str(entry.cert_file or ""),
            tls_key_file=str(entry.key_file or ""),
            receive_maximum=entry.receive_maximum,
            session_expiry_s=entry.session_expiry.ms // 1000,
            share=entry.share,
            allow_anonymous=entry.allow_anonymous,
            allow_qos0=entry.allow_qos0,
            batch=entry.batch,
        )
    )


# -- The life of a daemon
# --------------------------------------------------------------------------------------------


def run(config_path: Path | None) -> int:
    """Run the daemon until a signal stops it; the process's exit code.

    Raises `MeterdError` before it has started.
    """
    notes: list[Mistake] = []
    settings = config.load(config_path, os.environ, warn=notes.append)
    _say(settings, notes)
    try:
        return asyncio.run(_serve(settings, config_path))
    except MeterdError:
        raise
    except Exception as group:  # Past here Python itself would write it, unmasked.
        error = _first(group)
        if isinstance(error, MeterdError):
            log.critical(str(error), action="stopped_by_failure")
            return error.exit_code
        log.critical(
            "meterd stops by a mistake of its own; start it again, and report what stands here.",
            action="stopped_by_mistake",
            exc_info=error,
        )
        return InvariantBroken.exit_code


def put_back(file: Path, settings: Settings) -> Restored:
    """Put a copy of a store in the place of the one that the configuration names; `MeterdError`."""
    data_dir = Path(settings.daemon.data_dir)
    return restore(file, data_dir, entries_max=settings.dedupe.entries_max)


def _say(settings: Settings, notes: Sequence[Mistake]) -> None:
    """Set the logs up: what must not be said first, then how, then what there is to say."""
    for secret in settings.secrets():
        logs.hide(secret)
    logs.configure(settings.log.level, settings.log.format, sys.stderr)
    for note in notes:
        log.warning(str(note), action="configuration_note")


def _first(group: BaseException) -> BaseException:
    """What brought a group of tasks down: the first that is no cancellation."""
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return group


async def _serve(settings: Settings, config_path: Path | None) -> int:
    """Open the state, run the parts on it, and close it whatever happens."""
    _suit_batches()
    clock = SystemClock()
    started = clock.mono()
    registry = CollectorRegistry()
    sources = [source_of(entry) for entry in settings.sources]
    metrics = Metrics(
        registry, meters=tuple(settings.meters), sources=[source.name for source in sources]
    )
    store = SqliteStore.open(settings.daemon.data_dir, entries_max=settings.dedupe.entries_max)
    store.on_commit, store.on_writable = metrics.on_commit, metrics.on_writable
    try:
        state = store.load()
        bookkeeper = await _open_books(settings, store, state, metrics, clock)
        mono, wall, observe = clock.mono, clock.wall, metrics.observe
        payer_api = payer_api_of(settings)
        async with (
            EscrowClient(escrow_api_of(settings), mono=mono, wall=wall, observe=observe) as escrow,
            EscrowClient(payer_api, mono=mono, wall=wall, observe=observe) as payer,
            WalletClient(wallet_api_of(settings), mono=mono, wall=wall, observe=observe) as wallet,
        ):
            service = PaymentService(escrow, wallet)
            opener = Opener(
                bookkeeper,
                OpeningService(escrow, payer),
                terms_of(settings),
                unbound=state.openings,
                opened=state.opened,
            )
            daemon = Daemon(
                settings, config_path, bookkeeper, service, opener, sources, metrics, store
            )
            gc.collect()
            gc.freeze()  # What lives as long as the process need not be looked at again.
            log.info(
                f"meterd {__version__} is up.",
                action="started",
                data_dir=str(settings.daemon.data_dir),
                agreements=len(bookkeeper.ledger.accounts),
                identities=len(store.identities),
                seconds=round(clock.mono() - started, 3),
            )
            await daemon.run()
    finally:
        await store.close()
    log.info("Stopped.", action="stopped")
    return 0


def _suit_batches() -> None:
    """Set the interpreter up for work in batches of thousands, and for a ledger of any size.

    Entries of a batch are young lists that are freed by counting alone; at the usual threshold of
    700 the garbage collector walks through them dozens of times a batch, and finds nothing.
    """
    gc.set_threshold(GARBAGE_YOUNG_MAX, 10, 10)
    sys.setswitchinterval(SWITCH_INTERVAL_S)


async def _open_books(
    settings: Settings, store: SqliteStore, state: State, metrics: Metrics, clock: SystemClock
) -> Bookkeeper:
    """Rebuild the ledger from the store, step over the restart, bind what is configured."""
    in_use = {row.plan: row.id for row in state.agreements}
    gone = [
        Mistake(f"plans.{plan}", f"is missing, and agreement {agreement} is under it; put it back")
        for plan, agreement in sorted(in_use.items())
        if plan not in settings.plans
    ]
    if gone:
        raise ConfigurationError(gone)
    try:
        ledger = Ledger.restore(plans_of(settings), meters_of(settings), state)
    except Conflict as conflict:
        raise StoreCorrupt(str(conflict)) from None
    bookkeeper = Bookkeeper(
        ledger,
        store,
        store.identities,
        rules_of(settings),
        clock,
        metrics,
        decoder=EventDecoder(secrets.randbits(60)),
        window_ms=settings.dedupe.window.ms,
        positions=state.positions,
        dead_letters=state.dead_letters,
        dead_letter_next=state.dead_letter_next,
        holds=state.holds,
        voids=state.voids,
        void_next=state.void_next,
        sequences=Sequences(state.producers, state.numbers_from),
        producers=producers_of(settings),
    )
    bookkeeper.notary = _notary(settings, state)
    bookkeeper.keys = Keys(state.keys)
    _check_agreements(ledger, ledger.plans, settings)
    await bookkeeper.start()
    await bookkeeper.reload(ledger.plans, ledger.meters)  # A price may have changed meanwhile.
    await _bind(bookkeeper, settings)
    return bookkeeper


def _notary(settings: Settings, state: State) -> Notary:
    """Have receipts signed with the key of this state directory; the first start makes it."""
    key, new = key_in(Path(settings.daemon.data_dir))
    logs.hide(key.private_bytes_raw().hex())
    notary = Notary(key, state.receipts)
    if new and state.receipts:
        log.warning(
            "The key that signed the receipts is gone: from now on they are signed with a new one.",
            action="receipts_key_made",
            key=notary.public,
            next=f"put your copy of {KEY_NAME} back, or tell the payers the new key",
        )
    return notary


def _check_agreements(ledger: Ledger, plans: Mapping[str, Plan], settings: Settings) -> None:
    """Hold every agreement of the configuration against what is bound, before anything changes.

    Raises `ConfigurationError`.
    """
    objections = (ledger.objection(agreement, plans) for agreement in agreements_of(settings))
    mistakes = [
        Mistake(f"agreements[{index}]", objection)
        for index, objection in enumerate(objections)
        if objection
    ]
    if mistakes:
        raise ConfigurationError(mistakes)


async def _bind(bookkeeper: Bookkeeper, settings: Settings) -> None:
    for agreement in agreements_of(settings):
        await bookkeeper.bind(agreement, "config")


class Daemon:
    """The running parts, from the first read to the end of the drain."""

    def __init__(
        self,
        settings: Settings,
        config_path: Path | None,
        bookkeeper: Bookkeeper,
        service: PaymentService,
        opener: Opener,
        sources: Sequence[Source],
        metrics: Metrics,
        store: SqliteStore,
    ) -> None:
        self._settings = settings
        self._config_path = config_path
        self._bookkeeper = bookkeeper
        self._store = store
        self._metrics = metrics
        self._intake = Intake(bookkeeper, sources, pending_max=settings.http.pending_max)
        self._settler = Settler(bookkeeper, service, pace_of(settings))
        self._opener = opener
        files = certificate_files_of(settings)
        self._certificate = None if files is None else Certificate(files)
        self._fatal: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._supervision = Supervision(os.environ)
        self._stop = asyncio.Event()
        self._hard_stop = asyncio.Event()
        self._reloads: set[asyncio.Task[None]] = set()
        self._one_reload = asyncio.Lock()  # Two at once could end with half of the older file.

    async def run(self) -> None:
        """Serve until a signal, then drain. Raises what ends the process before."""
        with self._signals():
            async with self._http(), asyncio.TaskGroup() as group:
                readers = [
                    group.create_task(self._intake.run(source), name=f"source {source.name}")
                    for source in self._intake.sources
                ]
                side = [
                    group.create_task(self._settler.run(), name="settler"),
                    group.create_task(self._opener.run(), name="opener"),
                    group.create_task(self._tidy(), name="tidy"),
                    group.create_task(self._bookkeeper.take_back_voided(), name="voids"),
                    group.create_task(self._intake.watch_lag(LAG_INTERVAL_S), name="lag"),
                    group.create_task(self._failure(), name="failure"),
                    group.create_task(self._supervision.keep_alive(), name="supervision"),
                ]
                self._supervision.tell(READY)
                await self._stop.wait()
                self._supervision.tell(STOPPING)
                await self._drain(readers)
                for task in (*readers, *side):
                    task.cancel()

    async def _drain(self, readers: list[asyncio.Task[None]]) -> None:
        """Read no more; commit and ack what was read; settle what is due; say what is left."""
        timeout = self._settings.daemon.drain_timeout.ms / 1000
        log.info("Draining.", action="draining", timeout_s=timeout)
        self._intake.stop()
        drained = asyncio.create_task(self._settle_out(readers), name="drain")
        hard = asyncio.create_task(self._hard_stop.wait(), name="second signal")
        await asyncio.wait((drained, hard), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        self._settler.halt()
        hard.cancel()
        complete = drained.done()
        drained.cancel()
        totals = self._bookkeeper.ledger.totals()
        paid = totals.settled + totals.credited + totals.held
        log.info(
            "Drained."
            if complete
            else "Stopped before everything was settled; it goes on after the next start.",
            action="drained" if complete else "drain_cut_off",
            accrued_usdc=format_exact(totals.accrued),
            released_usdc=format_amount(totals.settled),
            unsettled_usdc=format_exact(totals.accrued - Fraction(paid, MICROS)),
            in_doubt_usdc=format_amount(totals.held),
            dead_letters=self._bookkeeper.dead_letters,
        )

    async def _settle_out(self, readers: list[asyncio.Task[None]]) -> None:
        if readers:
            await asyncio.wait(readers)
        await self._settler.drain()

    async def _failure(self) -> None:
        """Raise what must end the process, wherever it was seen first."""
        failed = asyncio.ensure_future(self._store.failed.wait())
        try:
            await asyncio.wait((failed, self._fatal), return_when=asyncio.FIRST_COMPLETED)
        finally:
            failed.cancel()
        if self._fatal.done():
            self._fatal.result()
        raise self._store.failure or StoreFailed("the store failed")

    def _end(self, error: BaseException) -> None:
        if not self._fatal.done():
            self._fatal.set_exception(error)

    async def _tidy(self) -> None:
        while True:
            await asyncio.sleep(TIDY_INTERVAL_S)
            await self._bookkeeper.tidy()

    # -- Reload --------------------------------------------------------------------------------

    async def _reload_when_asked(self) -> None:
        try:
            async with self._one_reload:
                await self._reload()
        except Exception as error:  # noqa: BLE001  # Nobody waits for this task: `_failure` raises it.
            self._end(error)

    async def _reload(self) -> None:
        """Take plans, meters, agreements and the log level anew. A bad file changes nothing."""
        try:
            notes: list[Mistake] = []
            fresh = config.load(self._config_path, os.environ, warn=notes.append)
            plans = plans_of(fresh)
            _check_agreements(self._bookkeeper.ledger, plans, fresh)
            files = certificate_files_of(fresh)
            if self._certificate is not None and files is not None:
                self._certificate.reload(files)
            await self._bookkeeper.reload(plans, meters_of(fresh))
            self._bookkeeper.producers = producers_of(fresh)
            await _bind(self._bookkeeper, fresh)
            patterns = tuple(discoveries_of(fresh))
            self._opener.terms = replace(self._opener.terms, patterns=patterns)
        except (ConfigurationError, Refused) as error:
            self._metrics.reloaded(success=False)
            log.error(
                f"The configuration was not reloaded: {error}",
                action="reload_refused",
                next="meterd check",
            )
            return
        _say(fresh, notes)
        self._metrics.reloaded(success=True)
        log.info("The configuration was reloaded.", action="reloaded")
        for name in ("daemon", "http", "otlp", "store", "dedupe", "escrow", "sources", "metrics"):
            if _needing_restart(fresh, name) != _needing_restart(self._settings, name):
                log.warning(
                    f"[{name}] has changed; that takes a restart.", action="reload_needs_restart"
                )

    # -- Edges of the process
    # ----------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _http(self) -> AsyncIterator[None]:
        """Serve the API while running; requests under way finish."""
        per_agreement = self._settings.metrics.per_agreement
        overview = api.Overview(self._bookkeeper, per_agreement=per_agreement)
        self._metrics.watch(
            Reads(
                figures=overview.latest,
                sources=self._intake.states.values,
                dead_letters=lambda: self._bookkeeper.dead_letters,
                holds=lambda: self._bookkeeper.holds.total,
                store_bytes=lambda: self._store.stats().bytes,
                missing=lambda: self._bookkeeper.sequences.missing,
                given_up=lambda: self._bookkeeper.sequences.given_up,
            )
        )
        app = api.build(
            api_settings_of(self._settings),
            self._bookkeeper,
            self._intake,
            settler=self._settler,
            opener=self._opener,
            overview=overview,
            instruments=self._metrics,
            store_bytes=lambda: self._store.stats().bytes,
            fatal=self._end,
        )
        listen = self._settings.http.listen
        runner = api.runner(app, shutdown_timeout=REQUESTS_TIMEOUT_S)
        await runner.setup()
        try:
            await listen_on(runner, listen, self._certificate)
            scheme = "http" if self._certificate is None else "https"
            where = str(listen) if listen.path else f"{scheme}://{listen}/"
            log.info(f"Listening on {where}", action="listening")
            try:
                yield
            finally:
                leave(listen)  # Only what is ours: another program may serve the same path.
        finally:
            await runner.cleanup()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Listen to SIGTERM, SIGINT and SIGHUP while running, and put back what was there."""
        loop = asyncio.get_running_loop()

        def stop() -> None:
            if self._stop.is_set():
                self._hard_stop.set()
            self._stop.set()

        def reload() -> None:
            task = loop.create_task(self._reload_when_asked(), name="reload")
            self._reloads.add(task)
            task.add_done_callback(self._reloads.discard)

        actions = {signal.SIGTERM: stop, signal.SIGINT: stop, signal.SIGHUP: reload}
        for number, action in actions.items():
            loop.add_signal_handler(number, action)
        try:
            yield
        finally:
            for number in actions:
                loop.remove_signal_handler(number)
