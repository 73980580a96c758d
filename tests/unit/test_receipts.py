"""Receipts: made, chained, signed and checked; every change in one is found."""

from __future__ import annotations

import base64
import hashlib
import json
import stat
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from meterd import receipts
from meterd.errors import StoreCorrupt, StoreFailed
from meterd.receipts import NoReceipts, Notary, canonical, check, key_in, read

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


def statement(amount: str, released: str, agreement: str = "a-1") -> dict[str, Any]:
    release = {"id": f"rel_{released}", "escrow": "esc_1", "amount": amount, "why": "amount"}
    return {
        "form": 1,
        "kind": "release",
        "agreement": agreement,
        "plan": "stream",
        "payer": "Müller & Söhne",
        "at": 1_764_000_000_000,
        "release": release,
        "usage": [],
        "events": 1,
        "accrued": released,
        "released": released,
    }


def shown(row: Any) -> dict[str, Any]:
    """The receipt as the API gives it."""
    return {
        "number": row.number,
        "statement": json.loads(row.statement),
        "hash": row.hash.hex(),
        "signature": base64.b64encode(row.signature).decode(),
    }


def chain(count: int = 4, notary: Notary | None = None, agreement: str = "a-1") -> list[Any]:
    notary = notary or Notary(KEY, {})
    made = [
        notary.receipt(statement("0.01", f"0.0{number}", agreement))
        for number in range(1, count + 1)
    ]
    return [shown(row) for row in made]


def test_chain_that_a_notary_made_is_whole():
    """In any order, with some given twice, and with the key that signed it."""
    made = chain()
    checked = check([*reversed(made), made[1]], [Notary(KEY, {}).public])

    assert not checked.broken
    assert {Notary(KEY, {}).public} == checked.keys
    found = checked.chains["a-1"]
    assert (1, 4, "0.04") == (found.first, found.last, found.released)
    assert "0" * 64 == made[0]["statement"]["previous"]
    assert made[0]["hash"] == made[1]["statement"]["previous"]


def test_notary_goes_on_where_a_store_ended():
    """By the heads alone: nothing else is remembered over a restart."""
    first = Notary(KEY, {})
    old = first.receipt(statement("0.01", "0.01"))
    new = Notary(KEY, {"a-1": (1, old.hash)}).receipt(statement("0.01", "0.02"))

    assert not check([shown(old), shown(new)]).broken


def test_canonical_form_is_what_other_languages_write():
    """Names in order, no blanks, UTF-8; the hash is its SHA-256."""
    text = canonical({"b": 1, "a": {"d": "ü", "c": None}})
    made = chain(1)[0]

    assert '{"a":{"c":null,"d":"ü"},"b":1}'.encode() == text
    assert hashlib.sha256(canonical(made["statement"])).hexdigest() == made["hash"]


CHANGES = {
    "amount": lambda each: each["statement"]["release"].update(amount="0.02"),
    "released": lambda each: each["statement"].update(released="9.99"),
    "agreement of usage": lambda each: each["statement"].update(usage=[{"meter": "x"}]),
    "previous": lambda each: each["statement"].update(previous="0" * 64),
    "hash": lambda each: each.update(hash="0" * 64),
    "no hash": lambda each: each.pop("hash"),
    "signature": lambda each: each.update(signature=base64.b64encode(bytes(64)).decode()),
    "signature is no base64": lambda each: each.update(signature="?"),
    "no signature": lambda each: each.pop("signature"),
    "key": lambda each: each["statement"].update(key="0" * 64),
    "key is none": lambda each: each["statement"].update(key=7),
    "number": lambda each: each["statement"].update(number=True),
}


@pytest.mark.parametrize("name", CHANGES)
def test_receipt_that_was_changed_is_found_and_named(name):
    """Whatever is changed in the third of four: it breaks there or is missing there."""
    made = chain()
    CHANGES[name](made[2])
    checked = check(made)

    assert checked.broken
    assert checked.chains["a-1"].last <= 2


def test_changed_receipt_with_a_new_hash_and_signature_breaks_the_next_one():
    """The seller himself cannot change one that has a successor."""
    made = chain()
    made[1]["statement"]["accrued"] = "7.00"
    text = canonical(made[1]["statement"])
    made[1]["hash"] = hashlib.sha256(text).hexdigest()
    made[1]["signature"] = base64.b64encode(KEY.sign(text)).decode()

    assert "receipt 3 of a-1: a fork or a change" in check(made).chains["a-1"].broken


def test_missing_receipt_is_named_and_a_part_of_a_chain_is_whole():
    """A gap breaks; a payer who has the last ones alone can still check them."""
    made = chain()

    assert (
        "receipt 4 of a-1: receipt 3 is missing" == check([*made[:2], made[3]]).chains["a-1"].broken
    )
    assert not check(made[2:]).broken
    assert 3 == check(made[2:]).chains["a-1"].first


def test_fork_is_found_when_both_sides_are_seen():
    """A store that was put back from a copy makes another receipt 2."""
    notary = Notary(KEY, {})
    first = notary.receipt(statement("0.01", "0.01"))
    old = notary.receipt(statement("0.01", "0.02"))
    other = Notary(KEY, {"a-1": (1, first.hash)}).receipt(statement("0.05", "0.06"))

    assert "a fork" in check(map(shown, (first, old, other))).chains["a-1"].broken


def test_receipt_of_another_key_is_found_when_the_key_is_given():
    """Without one, every key that signed is named."""
    other = Ed25519PrivateKey.generate()
    made = chain(2)
    head = 2, bytes.fromhex(made[-1]["hash"])
    more = shown(Notary(other, {"a-1": head}).receipt(statement("0.01", "0.03")))

    assert 2 == len(check([*made, more]).keys)
    assert "another key" in check([*made, more], [Notary(KEY, {}).public]).chains["a-1"].broken


def test_released_never_shrinks_and_grows_by_what_was_paid():
    """A signed total that does not add up is found too."""
    notary = Notary(KEY, {})
    for said in ("0.005", "0.019"):
        rows = [notary.receipt(statement("0.01", each, said)) for each in ("0.01", said)]
        assert "released grows by" in check(map(shown, rows)).chains[said].broken


def test_receipts_are_read_as_pages_lists_lines_or_alone():
    """As the API gives them, and as programs keep them."""
    made = chain(2)
    forms = [
        json.dumps({"items": made, "next": None}),
        json.dumps(made),
        "\n".join(json.dumps(each) for each in made),
        "\n".join(json.dumps({"items": [each], "next": None}) for each in made),
    ]

    assert [made] * 4 == [read(form.encode()) for form in forms]
    assert made[:1] == read(json.dumps(made[0]).encode())


@pytest.mark.parametrize("text", ["", "{", "[1]", "7", '{"a": 1}', '{"items": 1}', "[" * 10**5])
def test_what_is_no_receipt_is_refused(text):
    """With a sentence and without a trace."""
    if text == "":
        assert [] == read(b"")
        return
    with pytest.raises(NoReceipts):
        read(text.encode())


def test_key_is_made_once_for_its_owner_alone(tmp_path: Path):
    """The second start reads what the first one made."""
    first, new = key_in(tmp_path)
    second, again = key_in(tmp_path)

    assert (True, False) == (new, again)
    assert first.private_bytes_raw() == second.private_bytes_raw()
    assert 0o600 == stat.S_IMODE((tmp_path / receipts.KEY_NAME).stat().st_mode)
    assert [receipts.KEY_NAME] == [each.name for each in tmp_path.iterdir()]


def test_key_that_was_half_written_is_made_anew(tmp_path: Path):
    """Killed before it had its name, it has signed nothing."""
    (tmp_path / "receipts.key.new").write_bytes(b"12")
    _, new = key_in(tmp_path)

    assert new
    assert [receipts.KEY_NAME] == [each.name for each in tmp_path.iterdir()]


def test_file_that_is_no_key_stops_the_start(tmp_path: Path):
    """Signing with another key in silence would make the old receipts doubtful."""
    (tmp_path / receipts.KEY_NAME).write_text("no key")
    with pytest.raises(StoreCorrupt, match="holds no key"):
        key_in(tmp_path)
    with pytest.raises(StoreFailed):
        key_in(tmp_path / "nowhere")
