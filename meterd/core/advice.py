"""What a person does next, for each trouble: one answer for the screen, the API, the log.

The rule: where meterd decides by itself there is a command that looks, and none that acts. A
release that is merely in doubt is resolved by a reading or by time; to say by hand what became of
it, too early and wrongly, is the way to pay twice.
"""

from __future__ import annotations

from meterd.core.settlement import UNKNOWN_OUTCOME, Escrow, EscrowStatus, ReleaseStatus, Rules

EXHAUSTED = "exhausted"
LATE = ReleaseStatus.LATE.value
IN_DOUBT, ESCALATED = ReleaseStatus.IN_DOUBT.value, ReleaseStatus.ESCALATED.value
FROZEN, PAUSED = EscrowStatus.FROZEN.value, EscrowStatus.PAUSED.value
ADOPTING = EscrowStatus.ADOPTING.value

# Why nothing is released anywhere, and what helps.
STOPPING = "meterd is stopping"
DISK_FULL = "the disk is full"
KEY_REFUSED = "the escrow service refuses the key"
_AGAINST = {
    STOPPING: "",
    DISK_FULL: "make room on the disk of daemon.data_dir; it goes on by itself",
    KEY_REFUSED: "put escrow.api_key right and start meterd again; look: meterd check --live",
}
_ONE_AFTER_THE_OTHER = "nothing: it goes on by itself; what is in doubt: meterd releases"
# What waits until a person has acted, and not only for time to pass.
FOR_A_PERSON = frozenset({DISK_FULL, KEY_REFUSED})


def against(blocked: str) -> str:
    """What to do when all releases are blocked for this reason; "" when nothing is to be done."""
    return _AGAINST.get(blocked, _ONE_AFTER_THE_OTHER) if blocked else ""


def trouble(escrow: Escrow, word: str) -> str:
    """Name what is wrong with an escrow that is shown as `word`; "" when nothing is.

    One of escalated, late, frozen, in_doubt, paused, adopting, exhausted: the gravest of them.
    """
    release = escrow.release
    if release is not None and release.status is ReleaseStatus.ESCALATED:
        return ESCALATED
    if word == FROZEN:
        return LATE if late(escrow) else FROZEN
    if release is not None and release.status is ReleaseStatus.IN_DOUBT:
        return IN_DOUBT
    if word == ADOPTING:
        return ADOPTING if escrow.failures or escrow.reason.startswith(_SAYS) else ""
    return word if word in (PAUSED, EXHAUSTED) else ""


_SAYS = "the service says"  # The reason of an escrow that is read and is not as it should be.


def late(escrow: Escrow) -> int:
    """The amount that landed late and is why the escrow is frozen, in micros; 0: that is not it."""
    return next(
        (
            void.amount
            for void in reversed(escrow.voids)
            if void.status is ReleaseStatus.LATE and void.id in escrow.reason
        ),
        0,
    )


def next_command(agreement: str, escrow: Escrow, word: str, plan: str) -> str:
    """Name the command that helps an agreement on, or that shows how it does; "" for none."""
    kind, release = trouble(escrow, word), escrow.release
    if release is not None and release.status in UNKNOWN_OUTCOME and kind != IN_DOUBT:
        return f"meterd resolve {release.id} --landed|--absent --reason TEXT"
    if kind in (FROZEN, LATE):
        return f"meterd resume {agreement} --reason TEXT"
    if kind == IN_DOUBT:
        return f"meterd releases {agreement}"
    if kind in (PAUSED, ADOPTING):
        # It is read and is not as it should be; or the way to the service is what is wrong.
        read = escrow.reason.startswith(_SAYS)
        return f"meterd agreements {agreement}" if read else "meterd check --live"
    return f"meterd bind NEW_ESCROW --plan {plan}" if kind == EXHAUSTED else ""


def doubt(escrow: Escrow, rules: Rules, mono: float) -> str:
    """Say what is known of a doubt and when it ends; "" when there is none."""
    release = escrow.release
    if release is None or release.status not in (ReleaseStatus.IN_DOUBT, ReleaseStatus.ESCALATED):
        return ""
    said = f"release {release.id}: {release.history[-1][2]}"
    if release.status is ReleaseStatus.ESCALATED:
        return f"{said}; look for {release.id} at the escrow service and say what became of it"
    if escrow.status is EscrowStatus.FROZEN:
        return f"{said}; frozen, it is confirmed when a reading shows it, and never given up"
    if rules.honoured:
        return f"{said}; the same call is made again with its key until it is answered"
    left = 2 * rules.quarantine * escrow.quarantine_factor - (mono - release.since_mono)
    then = "a person is asked" if rules.strict else "it is given up and paid anew"
    if left <= 0:
        return f"{said}; readings decide now: confirmed if one shows it, else {then}"
    return f"{said}; confirmed as soon as a reading shows it; if none does, {then} in {span(left)}"


def span(seconds: float) -> str:
    """A duration as a person says it."""
    whole = int(seconds)
    if whole < 120:
        return f"{whole} s"
    return f"{whole // 60} min" if whole < 7200 else f"{whole // 3600} h"
