"""Options of the programs, as their manifests have them."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest

from csi_driver.doctor.access_checks import check_permissions
from csi_driver.doctor.findings import CheckResult
from csi_driver.doctor.installation import Workload


def workload(*args: str, command: tuple[str, ...] = ()) -> Workload:
    return Workload({"spec": {"template": {"spec": {"containers": [{"command": [*command], "args": [*args]}]}}}})


@pytest.mark.parametrize(
    "args, values",
    [
        (("node", "--kubelet-dir=/a"), ["/a"]),
        (("node", "--kubelet-dir", "/a", "--node-name", "n"), ["/a"]),
        (("node", "--kubelet-dir=/a", "--kubelet-dir", "/b"), ["/a", "/b"]),
        (("node", "--kubelet-dir=/a=b"), ["/a=b"]),
        (("node", "--kubelet-dir="), [""]),
        (("node", "--kubelet-dir"), [""]),
        (("node", "--kubelet-directory=/a", "kubelet-dir=/a"), []),
        ((), []),
    ],
)
def test_values_of_an_option(args: tuple[str, ...], values: list[str]) -> None:
    """As in the programs, the last value of a repeated option counts."""
    assert workload(*args).flags("kubelet-dir") == values
    assert workload(command=args).flags("kubelet-dir") == values
    assert workload(*args).flag("kubelet-dir", "/default") == (values[-1] if values else "/default")


@pytest.mark.parametrize(
    "args", [("--ca-secret=ca",), ("--ca-secret", "ca"), ("--ca-secret=a/ca", "--ca-secret", "ca")]
)
async def test_option_that_names_no_namespace_is_a_finding(args: tuple[str, ...]) -> None:
    workloads = {"certmount-authority": workload("authority", *args), "certmount-node": workload("node")}

    async def find(_kind: str, name: str) -> Workload | None:
        return workloads.get(name)

    installation: Any = mock.Mock(namespace="certmount", workload=find)
    installation.reader.is_allowed = mock.AsyncMock(return_value=False)
    result = CheckResult("permissions")
    await check_permissions(installation, result)
    problem = (
        "the Deployment certmount-authority has the option --ca-secret with the value 'ca'; expected NAMESPACE/NAME"
    )
    assert [each.problem for each in result.findings] == [problem]


@pytest.mark.parametrize(
    "args, environment, namespaces, gateways",
    [
        ((), {"NAMESPACES": "shop web"}, {"shop", "web"}, False),
        (("--namespace=shop",), {"NAMESPACES": "old"}, {"shop"}, False),
        (("--gateways", "--namespace=shop"), {}, {"shop"}, True),
        (("--namespace=shop", "--gateways"), {"GATEWAYS": "false"}, {"shop"}, True),
        *(((), {"NAMESPACES": "shop", "GATEWAYS": value}, {"shop"}, True) for value in ("1", "on", "T", "Yes", "y")),
    ],
)
async def test_permissions_of_the_secrets_controller_follow_its_options(
    args: tuple[str, ...], environment: dict[str, str], namespaces: set[str], gateways: bool
) -> None:
    controller = workload("secrets", "run", *args)
    variables = [{"name": f"CERTMOUNT_SECRETS_{name}", "value": value} for name, value in environment.items()]
    controller.item["spec"]["template"]["spec"]["containers"][0]["env"] = variables

    async def find(_kind: str, name: str) -> Workload | None:
        return controller if name == "certmount-secrets" else None

    installation: Any = mock.Mock(namespace="certmount", workload=find)
    installation.reader.is_allowed = mock.AsyncMock(return_value=True)
    await check_permissions(installation, CheckResult("permissions"))
    reviews = [call.args[0]["spec"]["resourceAttributes"] for call in installation.reader.is_allowed.call_args_list]
    assert {each["namespace"] for each in reviews if each["resource"] == "ingresses"} == namespaces
    assert any(each["resource"] == "gateways" for each in reviews) is gateways
