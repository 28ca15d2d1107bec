"""All checks of ``certmount doctor``, in the order of the report."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Mapping, Sequence

from csi_driver.doctor.access_checks import check_permissions
from csi_driver.doctor.findings import CheckResult, NotChecked
from csi_driver.doctor.installation import Installation
from csi_driver.doctor.kubelet_checks import check_kubelet_directory
from csi_driver.doctor.manifest_checks import (
    check_admission_policy,
    check_api_server,
    check_csi_driver,
    check_namespace,
    check_network_policies,
    check_versions,
    check_workloads,
)
from csi_driver.doctor.program_checks import check_authority, check_policy, check_programs, check_roots

_Check = Callable[[Installation, CheckResult], Awaitable[None]]
CHECKS: Mapping[str, _Check] = {
    "api server": check_api_server,
    "namespace": check_namespace,
    "csi driver": check_csi_driver,
    "workloads": check_workloads,
    "kubelet directory": check_kubelet_directory,
    "permissions": check_permissions,
    "network policies": check_network_policies,
    "admission policy": check_admission_policy,
    "policy": check_policy,
    "roots": check_roots,
    "programs": check_programs,
    "authority": check_authority,
    "versions": check_versions,
}


async def examine(installation: Installation) -> Sequence[CheckResult]:
    """Run the checks. Without an API server or the namespace, there is nothing more to check."""
    names = iter(CHECKS)
    results = []
    for name in itertools.islice(names, 2):
        results.append(await _run(installation, name))
        if results[-1].nothing_found:
            return results
    return [*results, *await asyncio.gather(*(_run(installation, name) for name in names))]


async def _run(installation: Installation, name: str) -> CheckResult:
    result = CheckResult(name)
    try:
        await CHECKS[name](installation, result)
    except NotChecked as reason:
        result.not_checked(reason.problem, reason.fix)
    return result
