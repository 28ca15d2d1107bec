"""Checks of what the programs see: clocks, DNS, the authority, issuers, the policy and the published roots."""

from __future__ import annotations

from collections.abc import Sequence

from csi_driver.authority.issuers.kinds import read_issuers
from csi_driver.authority.policy.policy_file import read_policy
from csi_driver.core.clocks import TOLERANCE_S, describe_skew
from csi_driver.core.errors import CertmountError
from csi_driver.core.formats.pem import decode_certificates, fingerprint
from csi_driver.core.texts import count
from csi_driver.doctor.findings import CheckResult, NotChecked
from csi_driver.doctor.installation import APPLY, Installation, Workload
from csi_driver.doctor.programs import AUTHORITY, DIAGNOSTICS, NODE, STATUS, ProgramPage

_DOMAIN = "cluster.local"
_ROOTS, _SERVING_ROOT = "root.crt", "authority.crt"


async def check_programs(installation: Installation, result: CheckResult) -> None:
    """Report what each program finds wrong: the driver's registration and connection to the authority, and its clock."""
    pages = [page for program in (AUTHORITY, NODE) for page in await installation.pages(program, DIAGNOSTICS)]
    for page in pages:
        logs = f"kubectl -n {installation.namespace} logs {page.pod.name}"
        if page.error:
            result.not_checked(f"{page.pod}: {page.error}", _port_forward(installation, page))
            continue
        for problem in page.document.get("problems") or ():
            result.error(str(problem), logs, page.pod.node)
        if abs(page.clock_s) > TOLERANCE_S:
            problem = describe_skew("this machine", f"node {page.pod.node}", page.clock_s)
            result.error(problem, "run on the machine whose clock is wrong: timedatectl set-ntp true")
    connected = {str(page.document["authority"]) for page in pages if page.document.get("authority")}
    result.summary = "; ".join(sorted(connected)) or "the programs find no problem"


async def check_authority(installation: Installation, result: CheckResult) -> None:
    """Report the checks of ``certmount authority --check`` and ``certmount issuer check``, run by each replica."""
    count = 0
    for page in await installation.pages(AUTHORITY, DIAGNOSTICS):
        for finding in page.document.get("findings") or ():
            count += 1
            if finding["ok"]:
                continue
            issuer = str(finding["issuer"])
            subject = f"issuer {issuer}: {finding['subject']}" if issuer else str(finding["subject"])
            command = f"issuer check {issuer}" if issuer else "policy check"
            run = f"kubectl -n {installation.namespace} exec {page.pod.name} -- certmount {command}"
            logs = f"kubectl -n {installation.namespace} logs {page.pod.name}"
            result.error(f"{subject}: {finding['text']}", run if issuer or subject == "policy" else logs, page.pod.name)
    result.summary = f"{count} checks of its replicas succeed"


async def check_policy(installation: Installation, result: CheckResult) -> None:
    """Validate the policy and the issuers in their ConfigMaps, which can be newer than the files of the replicas."""
    workload = await _authority(installation)
    summaries = []
    for option in ("policy", "issuers"):
        path = workload.flag(option)
        name, key = workload.config_map_of(path)
        if not path or not name:
            continue
        edit = f"kubectl -n {installation.namespace} edit configmap {name}"
        values = await installation.config_map(name)
        if values is None or key not in values:
            what = "does not exist" if values is None else f"has no key {key}"
            fix = APPLY if values is None else edit
            result.error(f"the ConfigMap {name} {what}", fix)
            continue
        try:
            summary, warnings = _parse(workload, option, values[key].encode())
        except CertmountError as error:
            for fault in error.faults:
                result.error(f"ConfigMap {name}: {key}: {fault}", edit)
            continue
        summaries.append(summary)
        for warning in warnings:
            result.warning(f"ConfigMap {name}: {key}: {warning}", edit)
    result.summary = ", ".join(summaries)


async def check_roots(installation: Installation, result: CheckResult) -> None:
    """Check that the ConfigMap with the roots, which the drivers mount, has those of the authority's CA."""
    workload = await _authority(installation)
    name = workload.flag("root-configmap", "certmount/certmount-root").rpartition("/")[2]
    values = await installation.config_map(name)
    restart = f"kubectl -n {installation.namespace} rollout restart deployment {AUTHORITY}"
    if values is None:
        problem = f"the ConfigMap {name} does not exist; the authority fills it, and cannot create it"
        result.error(problem, f"kubectl -n {installation.namespace} create configmap {name}")
        return
    found: dict[str, set[str]] = {}
    for key in (_ROOTS, _SERVING_ROOT):
        try:
            found[key] = {fingerprint(each) for each in decode_certificates(values.get(key, "").encode())}
        except ValueError:
            result.error(f"the ConfigMap {name} has no certificates in {key}; the authority writes them", restart)
            return
    for page in await installation.pages(AUTHORITY, STATUS):
        signing = ((page.document.get("ca") or {}).get("signing") or {}).get("roots") or ()
        if missing := {str(root["fingerprint"]) for root in signing} - found[_ROOTS]:
            problem = f"the ConfigMap {name} lacks the root {missing.pop()} of the CA that signs"
            result.error(problem, restart)
    result.summary = f"{name} has {count(len(found[_ROOTS]), 'root')}"


async def _authority(installation: Installation) -> Workload:
    workload = await installation.workload("deployments", AUTHORITY)
    if workload is None:
        raise NotChecked(f"the Deployment {AUTHORITY} does not exist", "see the check `workloads`")
    return workload


def _parse(workload: Workload, option: str, content: bytes) -> tuple[str, Sequence[str]]:
    """Return what the content declares, and its warnings; raises CertmountError with all faults."""
    if option == "issuers":
        declared = read_issuers(content)
        return count(len(declared), "external issuer"), ()
    domains = {name: workload.flag(name.replace("_", "-"), _DOMAIN) for name in ("trust_domain", "cluster_domain")}
    policy = read_policy(content, **domains)
    return count(len(policy.rules), "policy rule"), policy.warnings


def _port_forward(installation: Installation, page: ProgramPage) -> str:
    return f"kubectl -n {installation.namespace} port-forward {page.pod.name} {page.pod.port}"
