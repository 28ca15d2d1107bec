"""The attribute ``reload``: the processes of the pod that the driver signals after it has replaced the files of a volume."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum, unique

# The kernel truncates the names of processes to 15 bytes (PR_SET_NAME in prctl(2)).
_PROCESS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,14}", re.ASCII)
_SYNTAX = "use signal=HUP,process=nginx"


@unique
class ReloadSignal(Enum):
    """The signals that programs use to reload their configuration."""

    HUP = "HUP"
    USR1 = "USR1"
    USR2 = "USR2"


@dataclass(frozen=True, slots=True)
class Reload:
    """Send ``signal`` to the processes whose name is ``process``."""

    signal: ReloadSignal
    process: str

    def __str__(self) -> str:
        return f"signal={self.signal.value},process={self.process}"


def parse_reload(text: str) -> Reload:
    """Parse ``signal=HUP,process=nginx``; raises ValueError."""
    values = dict(item.strip(" ").partition("=")[::2] for item in text.split(",", maxsplit=2))
    if values.keys() != {"signal", "process"} or text.count(",") != 1:
        raise ValueError(f"is not a signal and a process; {_SYNTAX}")
    if values["signal"] not in ReloadSignal.__members__:
        raise ValueError("has an unknown signal; use " + ", ".join(ReloadSignal.__members__))
    if not _PROCESS.fullmatch(values["process"]):
        hint = "use the name in /proc/PID/comm: at most 15 letters, digits, '.', '_', '+' or '-'"
        raise ValueError(f"has an invalid process name; {hint}")
    return Reload(ReloadSignal(values["signal"]), values["process"])
