"""The pages of the authority for ``certmount status`` and ``certmount doctor``."""

from __future__ import annotations

import time

from csi_driver import __version__
from csi_driver.core.formats.pem import decode_certificates, fingerprint
from tests.integration.authority.world import Caller, World
from tests.support.tokens import DRIVER


async def test_status_has_policy_ca_issuers_root_sets_and_nodes(world: World, caller: Caller) -> None:
    stream = caller.watch()
    await stream.read()
    document = await world.server.status.document()
    (root,) = decode_certificates((world.ca / "root.crt").read_bytes())
    assert (document["version"], document["problems"]) == (__version__, [])
    assert abs(document["time"] - time.time()) < 5
    assert document["policy"]["rules"] == 1
    assert document["ca"]["phase"] == "steady"
    assert document["ca"]["signing"]["roots"][0]["fingerprint"] == fingerprint(root)
    assert document["issuers"] == [{"name": "internal", "environment": "internal", "problem": None}]
    (internal,) = document["rootSets"]
    not_after = f"{root.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}"
    assert (internal["name"], internal["roots"]) == (
        "internal",
        [{"fingerprint": fingerprint(root), "notAfter": not_after}],
    )
    assert document["nodes"] == [DRIVER.node]


async def test_diagnostics_find_a_policy_that_became_invalid_each_time(world: World) -> None:
    """The policy in force stays; the diagnosis reads the file, and changes neither the policy nor the metrics."""
    before = await world.server.status.document()
    world.policy.write_text("policy: [{allow: {dnz: [x]}}]\n")
    for _ in range(2):
        findings = {each["subject"]: each for each in (await world.server.status.diagnose())["findings"]}
        assert not findings["policy"]["ok"]
        assert "policy[0].allow.dnz" in findings["policy"]["text"]
        assert findings["certificate authority"]["ok"]
        assert findings["token keys"]["ok"]
    assert (await world.server.status.document())["policy"] == before["policy"]


async def test_status_has_no_keys(world: World, caller: Caller) -> None:
    await caller.issue()
    text = f"{await world.server.status.document()}{await world.server.status.diagnose()}"
    assert "PRIVATE KEY" not in text
