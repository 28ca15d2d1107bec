"""docs/commands.md shows what the commands print: each block is compared with the output on a terminal."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest

from tests.integration.doctor.test_doctor import NAMESPACE, RBAC
from tests.integration.doctor.test_status import published
from tests.integration.doctor.world import POLICY, ROOT, Installation, changed, on_terminal

pytestmark = pytest.mark.asyncio(loop_scope="package")
PAGE = (ROOT / "docs/commands.md").read_text()
BLOCKS = dict(re.findall(r"^    \$ (certmount .+)\n((?:    .*\n|\n(?=    ))+)", PAGE, flags=re.MULTILINE))
BROKEN_POLICY = "policy:\n- match: {namespaces: [web]}\n  allow: {dns: [api.example.com], colour: red}\n"
# What differs in each run, with the text that stands for it.
_VARIABLE = (
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", "TIME"),
    (r"generation [0-9_.]+", "generation N"),
    (r"SHA256:[0-9A-F:]{95}", "SHA256"),
    (r"SHA256:\S*\.\.\.", "SHA256"),
    (r"/\S*/kubernetes.io~csi/tls/mount", "/DIRECTORY"),
    (r"\b[0-9a-f]{36,40}\b", "SERIAL"),
    (r"\b\d{10}\b", "GENERATION"),
    (r"(intermediate|root) [0-9a-f]{8}", r"\1 ID"),
    (r"policy [0-9a-f]{16}", "policy REVISION"),
    (r"localhost:\d+|certmount-authority\.certmount\.svc:443", "ADDRESS"),
    (r"127\.0\.0\.1|10\.\d+\.\d+\.\d+", "IP"),
    (r"Kubernetes v[0-9.]+", "Kubernetes VERSION"),
    # The certificate is expired when the test is slow.
    (r"NameNotAllowed ", "STATE "),
    (r"CertificateExpired", "STATE"),
    (r"the certificate of pod web/edge-1 has expired; the renewal fails", "FAILED"),
    (r"the renewal of the certificate of pod web/edge-1 failed", "FAILED"),
    (r"0444  \d+:\d+", "0444  OWNER"),
    # The end of a table is cut at the width of the terminal.
    (r"(internal  node1)  .*", r"\1 NAMES"),
)  # fmt: skip


def normalized(text: str) -> list[str]:
    for pattern, replacement in _VARIABLE:
        text = re.sub(pattern, replacement, text)
    return [" ".join(line.split()) for line in text.strip().splitlines() if line.strip()]


def documented(command: str) -> str:
    """Return the output in the page, without the indentation."""
    return "\n".join(line.removeprefix("    ") for line in BLOCKS[command].splitlines())


async def shown(installation: Installation, command: str, *arguments: str) -> list[str]:
    words = [*(shlex.split(command)[1:]), *arguments]
    output = await asyncio.to_thread(on_terminal, installation, *words, NO_COLOR="1")
    print(f"    $ {command}", *(f"    {line}".rstrip() for line in output.splitlines()), sep="\n")
    return normalized(output)


async def test_page_has_an_example_of_each_command() -> None:
    assert [command.split()[1] for command in BLOCKS] == ["status", "doctor", "inspect"]


def policy_rules(installation: Installation) -> int:
    """Return the number of rules of the policy that is in force."""
    (authority,) = installation.run("status", "-o", "json").document["authorities"]
    return int(authority["policy"]["rules"])


async def test_status(installation: Installation) -> None:
    policy, command = installation.files / "policy.yaml", "certmount status"
    async with (
        published(installation, "edge-0"),
        published(installation, "edge-1", dns_names="api.example.com", duration="10s"),
    ):
        policy.write_text("policy: []\n")
        try:
            while installation.run("status", "--problems").status == 0:
                pass
            assert await shown(installation, command) == normalized(documented(command))
        finally:
            policy.write_text(POLICY)
            while not policy_rules(installation):
                pass


@contextlib.contextmanager
def defects(installation: Installation) -> Iterator[None]:
    role = f"{RBAC}/clusterroles/certmount-authority"
    rules: list[Any] = installation.api.call("GET", role)["rules"]
    rest = [{**rule, "resources": [each for each in rule["resources"] if each != "namespaces"]} for rule in rules]
    policy = {"data": {"policy.yaml": BROKEN_POLICY}}
    with (
        changed(installation, role, {"rules": rest}),
        changed(installation, f"{NAMESPACE}/configmaps/certmount-policy", policy),
    ):
        yield


async def test_doctor(installation: Installation) -> None:
    command = "certmount doctor"
    with defects(installation):
        assert await shown(installation, command) == normalized(documented(command))


async def test_inspect(installation: Installation) -> None:
    (command,) = (each for each in BLOCKS if each.startswith("certmount inspect"))
    async with published(installation, "edge-0", dns_names="api.example.com") as (path,):
        words = f"certmount inspect {path} --name=shop.example.com"
        assert await shown(installation, words) == normalized(documented(command))
        assert command.endswith(" --name=shop.example.com")


async def test_fields_of_the_output_for_scripts_are_documented(installation: Installation) -> None:
    """Each field of the JSON outputs is in a table of the page, and the other way round."""
    async with published(installation, "edge-0", dns_names="api.example.com") as (path,):
        status = (await asyncio.to_thread(installation.run, "status", "-o", "json")).document
        inspected = (await asyncio.to_thread(installation.run, "inspect", str(path), "-o", "json")).document
    with defects(installation):
        doctor = (await asyncio.to_thread(installation.run, "doctor", "-o", "json")).document
    for name, document in (("status", status), ("doctor", doctor), ("inspect DIR", inspected)):
        section = PAGE.split(f"### JSON of {name}\n")[1].split("\n#")[0]
        rows = re.findall(r"^\| `([a-zA-Z.\[\]]+)` \|", section, flags=re.MULTILINE)
        assert rows == list(_fields(document)), name


def _fields(value: Any, path: str = "") -> Iterator[str]:
    """Yield the paths of all fields, except those that other fields have too."""
    if isinstance(value, list):
        value, path = (value[0] if value else None), f"{path}[]"
    if isinstance(value, dict) and path not in ("ca", "intermediates[]", "roots[]"):
        for key, each in value.items():
            yield from _fields(each, f"{path}.{key}" if path else key)
    else:
        yield path.removesuffix("[]")
