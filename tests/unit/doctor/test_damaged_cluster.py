"""What a damaged cluster or a compromised node sends, in place of what the commands expect."""

from __future__ import annotations

import json
import time
from typing import Any
from unittest import mock

import pytest

from csi_driver.doctor.findings import CheckResult
from csi_driver.doctor.installation import Installation
from csi_driver.doctor.kubelet_checks import check_kubelet_directory
from csi_driver.doctor.manifest_checks import check_api_server
from csi_driver.doctor.programs import STATUS, ProgramPage, ProgramPod, program_pages
from csi_driver.doctor.status import InstallationStatus

POD = ProgramPod("certmount-node-0", "node1", True, "", 9440)
CERTIFICATE: dict[str, Any] = {
    **dict.fromkeys(("namespace", "pod", "volume", "node", "serial", "issuer", "notAfter", "nextRenewal"), "x"),
    "names": ["a.example.com"],
    "moreNames": 0,
    "interim": False,
    "condition": None,
}
PAGE: dict[str, Any] = {"version": "0.1.0", "time": 0, "problems": [], "certificates": [CERTIFICATE]}


async def page(**changes: Any) -> ProgramPage:
    content = json.dumps({**PAGE, "time": time.time(), **changes}).encode()
    reader: Any = mock.Mock(page=mock.AsyncMock(return_value=content))
    (found,) = [each async for each in program_pages(reader, "certmount", [POD], STATUS)]
    return found


@pytest.mark.parametrize("condition", [None, {"reason": "NameNotAllowed", "message": "no rule"}])
async def test_page_of_a_program(condition: Any) -> None:
    certificate = {**CERTIFICATE, "condition": condition, "later": 1}
    found = await page(certificates=[certificate], later={})
    assert (found.error, found.document["certificates"]) == ("", [certificate])


@pytest.mark.parametrize(
    "changes",
    [
        {"version": None},
        {"version": ["0.1.0"]},
        {"time": 10**400},
        {"time": 10**308 * 5},
        {"problems": 5},
        {"problems": "text"},
        {"problems": [{}]},
        {"authority": {}},
        {"certificates": {}},
        {"certificates": [7]},
        {"certificates": [{}]},
        *(
            {"certificates": [{key: value for key, value in CERTIFICATE.items() if key != left}]}
            for left in CERTIFICATE
        ),
        {"certificates": [{**CERTIFICATE, "namespace": 5}]},
        {"certificates": [{**CERTIFICATE, "names": "abc"}]},
        {"certificates": [{**CERTIFICATE, "condition": "failed"}]},
        {"certificates": [{**CERTIFICATE, "condition": {"reason": "x"}}]},
    ],
)
async def test_page_with_other_types_stops_no_command(changes: dict[str, Any]) -> None:
    found = await page(**changes)
    assert "sends a page /status that is not valid" in found.error
    assert [each.problem for each in InstallationStatus([], [found], []).problems()] == ["has no pods", found.error]


@pytest.mark.parametrize(
    "version, old",
    [
        ({"major": "1", "minor": "37+"}, False),
        ({"major": "1", "minor": "29"}, True),
        ({"major": "", "minor": "", "gitVersion": "v1.37.2-custom"}, False),
        ({"major": "", "minor": "", "gitVersion": "v1.28.0"}, True),
        ({"major": "", "minor": "", "gitVersion": "v0.0.0-master+$Format:%H$"}, False),
        ({"major": None, "minor": "x"}, False),
        ({}, False),
    ],
)
async def test_version_of_an_api_server_that_was_built_without_one(version: dict[str, Any], old: bool) -> None:
    reader: Any = mock.Mock(find=mock.AsyncMock(return_value=version))
    reader.clock_difference_s = mock.AsyncMock(return_value=0.0)
    result = CheckResult("api server")
    await check_api_server(Installation(reader, "certmount"), result)
    assert ["is too old" in each.problem for each in result.findings] == [True] * old


@pytest.mark.parametrize("directory", ["/x';reboot;'", "/$(reboot)", "/x#g;1e${IFS}reboot#", "/a`b`", "/\u2028"])
async def test_compromised_node_cannot_change_the_command_of_a_finding(directory: str) -> None:
    spec = {"containers": [{"volumeMounts": [{"name": "kubelet", "mountPath": "/var/lib/kubelet"}]}]}
    volumes = [{"name": "kubelet", "hostPath": {"path": "/var/lib/kubelet"}}]
    workload = {"spec": {"template": {"spec": {**spec, "volumes": volumes}}}}
    pods = [{"metadata": {"name": "certmount-node-0"}, "spec": {"nodeName": "node1"}, "status": {"phase": "Running"}}]

    async def listed(path: str, **_query: str) -> Any:
        for item in pods if path.endswith("/pods") else ():
            yield item

    async def find(path: str) -> Any:
        return workload if "daemonsets" in path else {}

    reader: Any = mock.Mock(find=find, list=listed)
    reader.text = mock.AsyncMock(return_value=f"\nkubelet flagz\nroot-dir={directory}\n")
    result = CheckResult("kubelet directory")
    await check_kubelet_directory(Installation(reader, "certmount"), result)
    assert any("has not registered the driver" in each.problem for each in result.findings)
    assert all(directory not in each.fix for each in result.findings)
