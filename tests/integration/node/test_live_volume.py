"""No republish affects a mounted volume."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.integration.node.bad_input import BAD_TOKENS, BLOCK, KUBELET, TOKENS, BadToken, change, tokens_of
from tests.integration.node.world import Node, Request
from tests.support.kubelet import FakePod

pytestmark = pytest.mark.asyncio(loop_scope="module")


def _put_token(bad: BadToken, request: Request) -> None:
    request.volume_context[TOKENS] = bad.make(FakePod())


_INVALID: dict[str, Callable[[Request], object]] = {
    "writable": lambda request: change(request, readonly=False),
    "block": lambda request: change(request, volume_capability=BLOCK),
    "no-capability": lambda request: change(request, volume_capability=None),
    "no-context": lambda request: request.volume_context.clear(),
    "unknown-attribute": lambda request: change(request, volume_context={"typo": "x"}),
    "hostile-attribute": lambda request: change(request, volume_context={"name": "\0\ud7ff" * 1000}),
    "writable-with-unknown-attribute": lambda request: change(request, readonly=False, volume_context={"typo": "x"}),
    "forged-key": lambda request: change(request, volume_context={f"{KUBELET}x": "x"}),
    "other-pod": lambda request: change(request, volume_context={f"{KUBELET}pod.uid": "other"}),
    "bad-group": lambda request: setattr(request.volume_capability.mount, "volume_mount_group", "x"),
    **{f"token-{kind}": partial(_put_token, bad) for kind, bad in BAD_TOKENS.items()},
}


@pytest.mark.parametrize("fault", _INVALID)
async def test_republish_of_a_mounted_volume_never_fails(node: Node, fault: str) -> None:
    """The kubelet would remove the mount."""
    pod = FakePod()
    request = await node.published(pod)
    state, shown = node.state(request), node.shown(request)
    bad = node.kubelet.publish_request(pod)
    _INVALID[fault](bad)
    await node.publish(bad)
    assert (node.state(request), node.shown(request), node.script.calls) == (state, shown, 1)


_contexts = st.dictionaries(
    st.one_of(st.text(max_size=20), st.sampled_from([f"{KUBELET}pod.uid", f"{KUBELET}ephemeral", TOKENS, "name"])),
    st.one_of(st.text(max_size=50), st.sampled_from(["{}", tokens_of("a.e30.c"), "[" * 3000, "0" * 300])),
    max_size=6,
)


@given(context=_contexts, secrets=_contexts, read_only=st.booleans(), group=st.text(max_size=5))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)
async def test_republish_with_any_content_never_fails(
    node: Node, context: dict[str, str], secrets: dict[str, str], read_only: bool, group: str
) -> None:
    """No file changes."""
    pod = FakePod(uid="survivor")
    request = node.kubelet.publish_request(pod)
    if not node.target(request).exists():
        await node.publish(node.request(pod))
    state = node.state(request)
    request.volume_context.update(context)
    request.secrets.update(secrets)
    request.readonly, request.volume_capability.mount.volume_mount_group = read_only, group
    await node.publish(request)
    assert (node.state(request), node.script.calls) == (state, 1)
