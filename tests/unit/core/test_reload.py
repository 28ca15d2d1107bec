"""The attribute ``reload``."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.core.attributes import parse_attributes
from csi_driver.core.errors import CertmountError
from csi_driver.core.reload import Reload, ReloadSignal, parse_reload


@pytest.mark.parametrize("text", ["signal=HUP,process=nginx", "process=nginx, signal=HUP"])
def test_signal_and_process_in_either_order(text: str) -> None:
    assert parse_reload(text) == Reload(ReloadSignal.HUP, "nginx")
    assert str(parse_reload(text)) == "signal=HUP,process=nginx"


NAME = "has an invalid process name; use the name in /proc/PID/comm: at most 15 letters, digits, '.', '_', '+' or '-'"
SYNTAX = "is not a signal and a process; use signal=HUP,process=nginx"
SIGNAL = "has an unknown signal; use HUP, USR1, USR2"


@pytest.mark.parametrize(
    "text, problem",
    [
        ("HUP", SYNTAX),
        ("signal=HUP", SYNTAX),
        ("signal=HUP,process=a,process=b", SYNTAX),
        ("signal=HUP,process=a,signal=HUP,pid=1", SYNTAX),
        ("signal=HUP,pid=1", SYNTAX),
        ("signal=KILL,process=nginx", SIGNAL),
        ("signal=TERM,process=nginx", SIGNAL),
        ("signal=9,process=nginx", SIGNAL),
        ("signal=,process=nginx", SIGNAL),
        ("signal=HUP,process=", NAME),
        ("signal=HUP,process=a-name-of-16-chr", NAME),
        ("signal=HUP,process=../1", NAME),
        ("signal=HUP,process=nginx\n", NAME),
        ("signal=HUP,process=(nginx) S 1", NAME),
        ("signal=HUP,process=ngïnx", NAME),
    ],
)
def test_error_says_what_to_write(text: str, problem: str) -> None:
    with pytest.raises(CertmountError) as raised:
        parse_attributes({"reload": text})
    assert str(raised.value).endswith(problem)


@given(st.text(max_size=60))
def test_any_text_is_a_reload_or_an_error(text: str) -> None:
    try:
        found = parse_reload(text)
    except ValueError:
        return
    assert found.process.isascii()
    assert len(found.process) <= 15
