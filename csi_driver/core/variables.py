"""Variables in names: ``${POD_NAME}`` and others stand for what the kubelet and the node driver know about the pod."""

from __future__ import annotations

import re
from collections.abc import Mapping

from csi_driver.core.names import InvalidName
from csi_driver.core.texts import shortened

VARIABLES = ("POD_NAME", "POD_NAMESPACE", "POD_UID", "SERVICE_ACCOUNT_NAME", "NODE_NAME")
MAX_SUBSTITUTED = 2048  # characters, as many as the longest name (a URI) can have
_MAX_VARIABLES = 64  # in one text; each takes 0.5 µs, and a list has 100 names
_VARIABLE = re.compile(r"\$\$\{|\$\{([^{}]*)\}|\$\{")
# No value can add a name, a label of a URI's host or an attribute of a subject that the text does not have.
_VALUE = re.compile(r"[A-Za-z0-9._-]{1,253}", re.ASCII)
_KNOWN = ", ".join(f"${{{name}}}" for name in VARIABLES)


def pod_variables(*, namespace: str, name: str, uid: str, service_account: str, node: str) -> Mapping[str, str]:
    """Return the values of the variables for a pod."""
    return dict(zip(VARIABLES, (name, namespace, uid, service_account, node), strict=True))


def substitute(text: str, values: Mapping[str, str]) -> str:
    """Replace each variable by its value, once, and ``$${`` by ``${``; raises InvalidName."""
    if "${" not in text:
        return text
    if (variables := text.count("${")) > _MAX_VARIABLES:
        raise InvalidName(f"has {variables} variables; use at most {_MAX_VARIABLES}")
    parts, size, end = [], 0, 0
    for match in _VARIABLE.finditer(text):
        parts += [text[end : match.start()], _value(match, values)]
        end, size = match.end(), size + len(parts[-2]) + len(parts[-1])
        if size + len(text) - end > MAX_SUBSTITUTED:
            raise InvalidName(f"is longer than {MAX_SUBSTITUTED} characters with the values of its variables")
    return "".join((*parts, text[end:]))


def _value(match: re.Match[str], values: Mapping[str, str]) -> str:
    name = match[1]
    if match[0] == "$${":
        return "${"
    if name is None:
        raise InvalidName("has ${ without }; write $${ for the text ${")
    if name not in VARIABLES:
        shown = ascii(shortened(name, 40))[1:-1]
        raise InvalidName(f"has the unknown variable ${{{shown}}}; use {_KNOWN}, or write $${{ for the text ${{")
    value = values.get(name, "")
    if not _VALUE.fullmatch(value):
        raise InvalidName(f"has the variable ${{{name}}}, which has no usable value for this pod")
    return value
