"""YAML files of administrators: plain data within limits, and errors with the line, its meaning and the fix."""

from __future__ import annotations

import itertools
import json
import time
import tracemalloc
from collections.abc import Callable

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from csi_driver.authority.issuers.kinds import read_issuers
from csi_driver.authority.policy.policy_file import read_policy
from csi_driver.config.located_yaml import MAX_BYTES, MAX_NODES, Located, read_yaml
from csi_driver.core.errors import CertmountError, Reason
from tests.unit.core.outcomes import outcome

ALIAS = "'*' begins an alias in YAML"
TEMPLATE = "'{{' begins a template; render the template first, for example with helm template"
LIBYAML = pytest.mark.skipif(
    not yaml.__with_libyaml__, reason="needs a PyYAML with libyaml: the parser in Python differs"
)
TAB = "a tab indents the line, but YAML allows only spaces; use spaces"
WHOLE = "policy file: this is a whole"
CONFIG_MAP = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: x}\ndata:\n  a: b\n  policy.yaml: |\n    policy: []\n"
UNFINISHED = "line 1: a '[' or '{' is not closed, or a value is missing before a ','; add what is missing"
UNFIT = "the line does not fit the lines above; check the indentation, brackets and quotes"


def read(content: str | bytes) -> Located:
    return read_yaml(content if isinstance(content, bytes) else content.encode(), "policy file", Reason.INVALID_POLICY)


def error_of(content: str | bytes) -> str:
    with pytest.raises(CertmountError) as raised:
        read(content)
    assert raised.value.reason is Reason.INVALID_POLICY
    return str(raised.value).removeprefix("InvalidPolicy: ")


@pytest.mark.parametrize(
    "content, words",
    [
        ("policy:\n- match: {serviceAccounts: [*]}\n", f'line 2: {ALIAS}; write "*"'),
        ("dns:\n- *.example.com\n", f'line 2: {ALIAS}; write "*.example.com"'),
        ("dns: *\n", f'line 1: {ALIAS}; write "*"'),
        ("a: 1\ndns:\n- *example\n", f'line 3: {ALIAS}; write "*example"'),
        ("dns:\n- {service}.x\n", """line 2: '{' begins a mapping in YAML; write "{service}.x\""""),
        ("allow: {emails: {service_account}@a.b}\n", """line 1: '{' begins a mapping in YAML; write "{service_account}@a.b\""""),
        ("dns: [a.b, {service}.{namespace}.svc]\n", """line 1: '{' begins a mapping in YAML; write "{service}.{namespace}.svc\""""),
        ("a:\n\tb: 1\n", f"line 2: {TAB}"),
        ("a:\n-\tb: 1\n", f"line 2: {TAB}"),
        ('dns:\n- "*\n- b\n', "line 2: a quote is not closed; add the closing quote"),
        ("dns:\n- '*\n", "line 2: a quote is not closed; add the closing quote"),
        ('dns:\n- "*".example.com\n', 'line 2: text follows a closing quote; write "*.example.com"'),
        ("a:\n  b:[x]\n  c: [x]\n", "line 2: a space is missing after 'b:'; write b: and the value"),
        ("a:\n  b: [x]\n  c:[x]\n", "line 3: a space is missing after 'c:'; write c: and the value"),
        pytest.param("a: {b:[x], c: [x]}\n", "line 1: a space is missing after 'b:'; write b: and the value", marks=LIBYAML),
        ("a:\n-x\n", "line 2: a space is missing after '-'; write '- ' before the item"),
        ("policy: []\npolicy: []\n", "line 2: the key 'policy' is duplicate, see line 1"),
        ("policy:\n- match: {a: 1,\n    a: 2}\n", "line 3: the key 'a' is duplicate, see line 2"),
        ("policy:\n- {match: {}, ? [1]: 2}\n", "line 2: a key is a list or a mapping; use a string"),
        ("policy: [\n}", UNFINISHED.replace("line 1", "line 2")),
        ("a:\n- b: 1\n   c: 2\n", f"line 3: {UNFIT}"),
        ("a: [", UNFINISHED),
        ("a: {b: 1,\n", UNFINISHED),
        ("a: [b,, c]\n", UNFINISHED),
        ("a: [b, c\n", "line 1: a list that begins with '[' is not closed; add ']' or ','"),
        ("a: @x\n", """line 1: '@' is reserved in YAML; write "@x\""""),
        ("a: `x`\n", """line 1: '`' is reserved in YAML; write "`x`\""""),
        ("a: %x\n", """line 1: '%' begins a directive in YAML; write "%x\""""),
        ("a: |x\n", """line 1: '|' begins a block of text in YAML; write "|x\""""),
        ("a: &x y\n", """line 1: '&' begins an anchor in YAML; write "&x y\""""),
        ("x: &x {a: 1}\npolicy: [{<<: *x}]\n", """line 1: '&' begins an anchor in YAML; write "&x\""""),
        ("a: !include b.yaml\n", """line 1: '!' begins a tag in YAML; write "!include b.yaml\""""),
        ("a: !!python/object/apply:os.system [id]\n", """line 1: '!' begins a tag in YAML; write "!!python/object/apply:os.system\""""),
        ("---\na: 1\n---\nb: 2\n", "line 3: '---' begins a second document; put everything in one document"),
        ("a: {{ .Values.policy }}\n", f"line 1: {TEMPLATE}"),
        ("{{- if .x }}\na: 1\n{{- end }}\n", f"line 1: {TEMPLATE}"),
        ("a:\n{{ toYaml .Values.policy | indent 2 }}\n", f"line 2: {TEMPLATE}"),
        ("reason: it: leaked\n", "line 1: a value contains ': ', which begins a mapping; put the value in quotes"),
        ('dns: ["\\*"]\n', "line 1: a backslash in double quotes begins an escape; use single quotes"),
        ("a: 1\nb: \x07\n", "line 2: has the invisible character U+0007; remove it"),
        ("a: \0\n", "line 1: has the invisible character U+0000; remove it"),
        ("a: 1\nb: \u202ex\n", "line 2: has the invisible character U+202E; remove it"),
        (b"a: 1\nb: \xff\n", "line 2: is not UTF-8 text; save the file as UTF-8"),
        ("a: 1\n".encode("utf-16"), "line 1: is not UTF-8 text; save the file as UTF-8"),
        ("[" * 1_000_000, "line 1: is nested more than 20 levels deep"),
        ("{a: " * 200_000, "line 1: is nested more than 20 levels deep"),
        (" " * (MAX_BYTES + 1), "policy file: is longer than 1048576 bytes"),
        ("[" + "a," * 300_000 + "]", f"line 1: the file has more than {MAX_NODES} values"),
        (CONFIG_MAP, f"{WHOLE} ConfigMap; pass the text under data.policy.yaml"),
        ("apiVersion: v1\nkind: List\nitems: []\n", f"{WHOLE} List; pass only the text of the file that it contains"),
        ("apiVersion: v1\nkind: Secret\nstringData:\n  policy.yaml: |\n    policy: []\n", f"{WHOLE} Secret; pass the text under stringData.policy.yaml"),
        ("data:\n  policy.yaml: |\n    policy: []\n", f"{WHOLE} ConfigMap; pass the text under data.policy.yaml"),
        ("policy.yaml: |\n  policy: []\n", "policy file: this is the data of a ConfigMap with the key policy.yaml; pass the text under policy.yaml"),
    ],
)  # fmt: skip
def test_error_has_the_line_its_meaning_and_the_fix(content: str | bytes, words: str) -> None:
    assert error_of(content) == words


@pytest.mark.parametrize(
    "read_file", [lambda content: read_policy(content, trust_domain="a", cluster_domain="b"), read_issuers]
)
def test_policy_and_issuers_are_explained_alike(read_file: Callable[[bytes], object]) -> None:
    for content, words in (
        (b"a: [*]", f'line 1: {ALIAS}; write "*"'),
        (b"apiVersion: v1\nkind: ConfigMap\n", "this is a whole ConfigMap"),
    ):
        with pytest.raises(CertmountError) as raised:
            read_file(content)
        assert words in str(raised.value)


@pytest.mark.parametrize("value", ["yes", "no", "on", "off", "1:30", "0777", "0x1f", "1_000", "1e3", "1.5", "2026-11-26", ".inf", "=", "<<", "-0", "+1", "y"])  # fmt: skip
def test_values_of_old_yaml_are_strings(value: str) -> None:
    """YAML 1.1 reads them as booleans, numbers and dates, which users do not expect."""
    assert read(f"a: {value}\n").data == {"a": value}


@pytest.mark.parametrize(
    "text, data",
    [
        ("\ufeffa: 1\r\nb: [x]\r\n", {"a": 1, "b": ["x"]}),
        pytest.param(json.dumps({"policy": [{"a": True}]}, indent="\t"), {"policy": [{"a": True}]}, marks=LIBYAML),
        ("a: ~\nb: null\nc:\nd: false\ne: -12\n", {"a": None, "b": None, "c": None, "d": False, "e": -12}),
        ("# only a comment\n", None),
    ],
)
def test_plain_data_is_read(text: str, data: object) -> None:
    assert read(text).data == data


def test_aliases_cannot_exhaust_memory() -> None:
    lines = (f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in itertools.pairwise("abcdefghi"))
    assert "begins an anchor" in error_of("a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(lines))


@pytest.mark.parametrize(
    "content", ["- a\n" * 262_144, "a: " + "[a]," * 250_000, "? " * 500_000, "- - - -\n" * 100_000]
)
def test_largest_file_needs_limited_time_and_memory(content: str) -> None:
    """The parser's own objects are not counted: it builds nothing before the limits are verified."""
    started = time.process_time()
    outcome(lambda: read(content), CertmountError)
    assert time.process_time() - started < 10
    tracemalloc.start()  # it makes Python several times slower
    outcome(lambda: read(content), CertmountError)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 * 1024 * 1024


def test_error_shows_the_start_of_a_long_key() -> None:
    result = outcome(lambda: read("\n".join(["? " + "k" * 400_000, ": 1"] * 2)), CertmountError)
    assert f"'{'k' * 76}... is duplicate, see line 1" in str(result)
    assert len(str(result)) < 400


PIECES = ["a", "policy", "é", "~", "1", "<<", ": ", ":", "- ", "? ", "---", "\n", "\n  ", "\r", "\t", ",", "{{ x }}", "\\"]  # fmt: skip
yaml_texts = st.lists(st.sampled_from([*PIECES, *"[]{}*!'\"#%@`|>", "&a "]), max_size=30).map("".join)


@given(st.one_of(yaml_texts, yaml_texts, st.text(max_size=50), st.binary(max_size=50)))
@example("? ")
@example("%YAML 1.1\n---\n")
def test_any_content_is_data_or_one_explained_line(content: str | bytes) -> None:
    if isinstance(content, str):
        content = content.encode("utf-8", "surrogatepass")
    result = outcome(lambda: read(content), CertmountError)
    if isinstance(result, CertmountError):
        assert str(result).isprintable()
        assert len(str(result)) < 400
