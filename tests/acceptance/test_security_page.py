"""docs/security.md: its shell lines are typed as they stand, and each test it names is there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from tests.acceptance.stage import Node, configuration, meterd
from tests.documents import ROOT, blocks
from tests.processes import Sandbox
from tests.signing import key_of

PAGE = ROOT / "docs" / "security.md"
TOKENS = """
[[http.tokens]]
name = "svc-a"
token_file = "svc-a-token"
scopes = ["ingest"]
[[http.tokens]]
name = "admin"
token = "an-admin-of-this-page-0123"
scopes = ["read", "admin"]
[[producers]]
name = "svc-a"
token = "svc-a"
secret_file = "svc-a-secret"
agreements = ["customer-*"]
[ingest]
require_producer = true
[plans.tokens]
pattern = "pay_per_token"
rates = [{ meter = "tokens", price = "0.001", per = 1000 }]
settle = { amount = "1.00" }
"""


def test_usage_is_signed_with_openssl_as_the_page_shows(tmp_path: Path) -> None:
    """Nothing but a shell, openssl and curl is needed to be a producer that signs."""
    [block] = [block for block in blocks(PAGE) if block.language == "sh"]
    (tmp_path / "svc-a-token").write_text("a-token-of-this-page-0123\n")
    (tmp_path / "svc-a-secret").write_text(key_of("page") + "\n")
    rest = TOKENS.replace("svc-a-token", f"{tmp_path}/svc-a-token")
    rest = rest.replace("svc-a-secret", f"{tmp_path}/svc-a-secret")
    with (
        Sandbox(tmp_path / "sandbox") as sandbox,
        Node(tmp_path, configuration(sandbox, rest=rest)) as node,
    ):
        node.wait_ready()
        body = {"plan": "tokens", "escrows": {"main": sandbox.lock("1.00")}}
        admin = {"Authorization": "Bearer an-admin-of-this-page-0123"}
        assert node.ask("PUT", "/v1/agreements/customer-1", body, **admin).status == 201
        script = block.text.replace("127.0.0.1:8787", f"127.0.0.1:{node.port}")
        done = subprocess.run(
            ["sh", "-eu", "-c", script],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=60,
            check=False,
        )

    assert done.returncode == 0, done.stderr
    assert [word for word in block.expected if word not in done.stdout] == []


def test_the_configuration_of_the_page_has_no_mistake(tmp_path: Path) -> None:
    """With its files in their place it is taken as it stands."""
    [block] = [block for block in blocks(PAGE) if block.language == "toml"]
    (tmp_path / "svc-a-token").write_text("a-token-of-this-page-0123\n")
    (tmp_path / "svc-a-secret").write_text(key_of("page") + "\n")
    config = tmp_path / "meterd.toml"
    text = block.text.replace('"svc-a-', f'"{tmp_path}/svc-a-')
    config.write_text(f'{text}\n[escrow]\napi_key = "pf_live_x"\n')
    assert meterd("check", "-c", str(config)).returncode == 0


def test_every_test_that_the_page_names_is_there() -> None:
    """A row of the table without its test would be a hope."""
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", PAGE.read_text())
    missing = [
        (file, name)
        for file, name in named
        if not (ROOT / file).is_file() or (name and f"def {name}(" not in (ROOT / file).read_text())
    ]

    assert len(named) > 15
    assert missing == []
