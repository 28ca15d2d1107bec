"""No token and no key in logs, records and events, at the debug log level."""

from __future__ import annotations

import base64
import re

import pytest

from tests.e2e import cluster, host, secrets
from tests.e2e.logs import AUTHORITY, DRIVER, SECRETS, LogCollector

pytestmark = pytest.mark.usefixtures("secrets_controller")

_TOKEN = re.compile(r"eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*")
_KEY = "PRIVATE KEY"


def _secrets_in_use() -> list[str]:
    """Return the Base64 lines of the keys of volumes, of Secrets and of the CA, and the signature of the driver's token."""
    keys = [path.read_text() for path in host.VOLUMES.glob("*/files/site.key")]
    managed = cluster.find("secrets", "-A", "-l", "app.kubernetes.io/managed-by=certmount")
    keys += [secrets.decoded(secret, "tls.key").decode() for secret in managed]
    stored = cluster.get("secret", "certmount-ca")["data"]
    keys += [base64.b64decode(stored[name]).decode() for name in ("root.key", "intermediate.key")]
    uid = host.driver()["metadata"]["uid"]
    token = (host.KUBELET / "pods" / uid / "volumes" / "kubernetes.io~projected" / "token" / "token").read_text()
    return [line for key in keys for line in key.splitlines() if "KEY" not in line] + [token.rpartition(".")[2]]


def test_logs_records_and_events_contain_no_secret(logs: LogCollector) -> None:
    running = [host.driver(), *host.authorities(), *secrets.replicas()]
    assert all("--log-level=debug" in pod["spec"]["containers"][0]["args"] for pod in running)
    in_use = _secrets_in_use()
    assert len(in_use) > 5
    texts = {
        "the driver's log": logs.text(DRIVER),
        "the authority's log": logs.text(AUTHORITY),
        "the Secrets controller's log": logs.text(SECRETS),
        "events": str(cluster.find("events", "--all-namespaces")),
        "records": "".join(path.read_text() for path in host.VOLUMES.glob("*/record.json*")),
        "the description of pods": cluster.kubectl("-n", cluster.CERTMOUNT, "describe", "pods"),
    }
    for where, text in texts.items():
        assert text, where
        assert not _TOKEN.search(text), f"a token in {where}"
        assert _KEY not in text, f"a key in {where}"
        assert not [secret for secret in in_use if secret in text], f"a secret in {where}"


def test_log_filter_redacted_nothing(logs: LogCollector) -> None:
    """The filter of the logs is defence in depth: no secret reached it."""
    assert "<redacted>" not in logs.text()
