"""Orders the end-to-end tests. They need the cluster that ``tests/e2e/run`` starts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import secrets
from tests.e2e.logs import LogCollector
from tests.support.requirements import missing, require_root

# Later modules disturb the whole node. The search for secrets follows all tests whose logs it covers. Helm is last, because
# those tests remove the installation.
_ORDER = (
    "test_first_start",
    "test_volumes",
    "test_commands",
    "test_services",
    "test_metrics",
    "test_reload",
    "test_hello_mtls",
    "test_access",
    "test_csr_signer",
    "test_csr_issuer",
    "test_autocert",
    "test_drop_in",
    "test_acme",
    "test_secrets_conditions",
    "test_secrets_acme",
    "test_secrets_attacks",
    "test_replicas",
    "test_revocation",
    "test_volume_health",
    "test_attacks_kube",
    "test_attacks_node",
    "test_interruptions",
    "test_pod_certificates",
    "test_rotation",
    "test_operations",
    "test_secrecy",
    "test_helm",
)
_DIRECTORY = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _DIRECTORY in item.path.parents:
            item.add_marker(pytest.mark.e2e)
    items.sort(key=lambda item: _ORDER.index(item.path.stem) if item.path.stem in _ORDER else -1)


@pytest.fixture(scope="session", autouse=True)
def logs() -> Iterator[LogCollector]:
    """Everything that certmount logs during the tests."""
    require_root()
    if not os.environ.get("CERTMOUNT_E2E_OVERLAY") or shutil.which("kubectl") is None:
        missing("needs a cluster; run tests/e2e/run")
    collector = LogCollector()
    yield collector
    collector.close()


@pytest.fixture(scope="session")
def secrets_controller(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The Secrets controller, which remains until the end: the search for secrets covers its logs too."""
    secrets.install(tmp_path_factory.mktemp("secrets"))
