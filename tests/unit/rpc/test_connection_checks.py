"""The file with the authority's root can have comments, as bundles of public CAs do."""

from __future__ import annotations

import time

import pytest

from csi_driver.core.errors import CertmountError, Reason
from csi_driver.rpc.serving_certificate import check_connection, find_clock_error
from tests.support.ports import free_port
from tests.support.scripted_authority import TestCA


@pytest.mark.parametrize("comment", ["# Root of Zürich\n", "# Root\n", "# \u2028\n\n"])
async def test_roots_with_comments_hide_no_failure(comment: str) -> None:
    roots, address = comment.encode() + TestCA().pem, f"127.0.0.1:{free_port()}"
    assert await find_clock_error(address, roots, "this node", time.time) is None
    with pytest.raises(CertmountError) as failure:
        await check_connection(address, roots)
    assert failure.value.reason is Reason.AUTHORITY_UNAVAILABLE
    assert "connection refused" in str(failure.value)
