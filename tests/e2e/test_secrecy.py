"""No token and no key anywhere where people look, at the most talkative log level."""

from __future__ import annotations

import base64
import re

from tests.e2e import host
from tests.e2e.kubectl import CERTMOUNT, find, get, kubectl
from tests.e2e.logs import LogKeeper

_TOKEN = re.compile(r"eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*")
_KEY = "PRIVATE KEY"


def _canaries() -> list[str]:
    """Parts of secrets that are in use: keys of volumes and of the CA without their PEM armour, and the driver's token."""
    keys = [path.read_text() for path in host.VOLUMES.glob("*/files/site.key")]
    stored = get("secret", "certmount-ca")["data"]
    keys += [base64.b64decode(stored[name]).decode() for name in ("root.key", "intermediate.key")]
    uid = host.driver()["metadata"]["uid"]
    token = (host.KUBELET / "pods" / uid / "volumes" / "kubernetes.io~projected" / "token" / "token").read_text()
    return [line for key in keys for line in key.splitlines() if "KEY" not in line] + [token.rpartition(".")[2]]


def test_no_token_and_no_key_in_logs_records_and_events(logs: LogKeeper) -> None:
    """At debug level, through all failures of these tests, neither component has logged a token or a key; nor are there any in events or records."""
    running = [*host.pods_of("certmount-node"), *host.pods_of("certmount-authority")]
    assert all("--log-level=debug" in pod["spec"]["containers"][0]["args"] for pod in running)
    canaries = _canaries()
    assert len(canaries) > 5
    texts = {
        "the driver's log": logs.text("certmount-node"),
        "the authority's log": logs.text("certmount-authority"),
        "events": str(find("events", "--all-namespaces")),
        "records": "".join(path.read_text() for path in host.VOLUMES.glob("*/record.json*")),
        "the description of pods": kubectl("-n", CERTMOUNT, "describe", "pods"),
    }
    for where, text in texts.items():
        assert text, where
        assert not _TOKEN.search(text), f"a token in {where}"
        assert _KEY not in text, f"a key in {where}"
        assert not [canary for canary in canaries if canary in text], f"a secret in {where}"


def test_nothing_had_to_be_cut_out(logs: LogKeeper) -> None:
    """The filter of the logs is a second belt: nothing ever reached it."""
    assert "<redacted>" not in logs.text()
