"""The table of ``certmount secrets status``."""

from __future__ import annotations

from csi_driver.secrets.status import SecretStatus, render_table


def test_annotations_of_a_tenant_add_no_row_and_do_not_control_the_terminal() -> None:
    condition = "\x1b[2J\nweb  bank  bank.example.com  \u202e"
    row = SecretStatus("shop", "tls", ("shop.example.com",), "internal", "\x9b2J", "failed", condition, "Ingress/shop")
    _, line = render_table([row])
    assert line.isprintable()
    assert line.endswith(r"\x1b[2J\nweb  bank  bank.example.com  \u202e")
