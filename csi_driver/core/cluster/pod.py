"""A pod as the API server has it at this moment."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LivePod:
    """What a claim about a pod is held against."""

    uid: str
    service_account: str
    node_name: str
    """Empty: it was not given to a node yet."""
    ending: bool
    """It is being deleted, or its containers have ended for good."""
