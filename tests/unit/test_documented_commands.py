"""Every command of the documentation is run by a test, or the table says why not."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest
import yaml

from tests.support.documentation import ROOT, commands, pages

TABLE: Mapping[str, Mapping[str, Mapping[str, str]]] = yaml.safe_load(
    (ROOT / "tests/unit/documented_commands.yaml").read_text(encoding="utf-8")
)
_WITH_COMMANDS = [page for page in pages() if commands(page)]


def test_table_has_exactly_the_pages_with_commands() -> None:
    assert sorted(TABLE) == sorted(_WITH_COMMANDS)


@pytest.mark.parametrize("page", _WITH_COMMANDS)
def test_each_command_has_an_entry_and_each_entry_a_command(page: str) -> None:
    """The longest beginning counts: "certmount ca stop --discard" is not an example of "certmount ca stop"."""
    entries = TABLE.get(page, {})
    used = set[str]()
    for command in commands(page):
        matching = [beginning for beginning in entries if command.startswith(beginning)]
        assert matching, f"{page}: add an entry to tests/unit/documented_commands.yaml for: {command}"
        used.add(max(matching, key=len))
    assert used == set(entries), f"{page} has no command that begins with {sorted(set(entries) - used)}"


@pytest.mark.parametrize(
    "page, beginning", [(page, beginning) for page, entries in TABLE.items() for beginning in entries]
)
def test_named_test_exists_and_reads_the_page_if_it_runs_its_text(page: str, beginning: str) -> None:
    ((kind, value),) = TABLE[page][beginning].items()
    if kind == "not run":
        assert value
        return
    assert kind in {"run", "like"}
    module, _, name = value.partition("::")
    text = (ROOT / module).read_text(encoding="utf-8")
    assert re.search(rf"^(?:async )?def {name}\(", text, flags=re.MULTILINE), value
    if kind == "run":
        if "tests.peers.recipes" in text:
            text += (ROOT / "tests/peers/recipes.py").read_text(encoding="utf-8")
        assert page.rpartition("/")[2] in text, f"{value} does not name {page}"
