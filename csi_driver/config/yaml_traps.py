"""Explain YAML syntax errors: the line, what its characters mean in YAML, and what to write instead."""

from __future__ import annotations

import re
from collections.abc import Iterator

import yaml

_MAX_LINE = 1000  # characters of a line that are examined
_INDICATORS = {
    "*": "begins an alias",
    "&": "begins an anchor",
    "!": "begins a tag",
    "@": "is reserved",
    "`": "is reserved",
    "%": "begins a directive",
    "|": "begins a block of text",
    ">": "begins a block of text",
}
_START = r"(?:^\s*|^\s*-\s+|[:\[{,]\s+|[\[{,])"  # where a value can begin
_INDICATOR = re.compile(_START + r"(?P<text>(?P<sign>[*&!@`%|>])[^\s,\]}]*(?: [^\s,\]}#{\[:]+)*)")
_BRACES = re.compile(_START + r"(?P<text>[\w.*@:/-]*\{[a-z_]+\}(?:[^\s,\]{}\"']|\{[a-z_]+\})*)", re.ASCII)
_TEXT_AFTER_QUOTE = re.compile(_START + r"(?P<quoted>\"[^\"]*\"|'[^']*')(?P<rest>[^\s,:\]}#][^\s,\]}]*)")
_NO_SPACE = re.compile(r"(?:^\s*(?:- )?|[{,]\s*(?=\w+:[\[{\"']))(?P<key>[A-Za-z_][\w-]*):(?=[\[{\"'\w])", re.ASCII)
_NO_SPACE_AFTER_DASH = re.compile(r"^\s*-(?=[^\s-])")
_QUOTES = "quoted scalar"
# libyaml's words, what they mean, and the fix. The first entry is for lines with several colons.
_PROBLEMS = (
    ("mapping values are not allowed", "a value contains ': ', which begins a mapping", "put the value in quotes"),
    ("unknown escape", "a backslash in double quotes begins an escape", "use single quotes"),
    ("could not find expected ':'", "a key has no ':'", "write key: value"),
    ("unhashable key", "a key is a list or a mapping", "use a string"),
    ("another document", "'---' begins a second document", "put everything in one document"),
    ("expected ',' or ']'", "a list that begins with '[' is not closed", "add ']' or ','"),
    ("expected ',' or '}'", "a mapping that begins with '{' is not closed", "add '}' or ','"),
    ("parsing a flow node", "a '[' or '{' is not closed, or a value is missing before a ','", "add what is missing"),
)


def explain(error: yaml.MarkedYAMLError, text: str) -> tuple[int, str, str]:
    """Return the line of a syntax error, what is wrong, and what to do."""
    lines = text.splitlines()
    mark, context = error.problem_mark, error.context_mark
    number = min(mark.line + 1, max(len(lines), 1)) if mark is not None else 1  # the end of the file is not a line
    if _QUOTES in (error.context or "") and context is not None and "end of stream" in (error.problem or ""):
        return context.line + 1, "a quote is not closed", "add the closing quote"
    for candidate in _candidates(number, context.line + 1 if context is not None else number, lines):
        if found := explain_line(lines[candidate - 1]):
            return candidate, *found
    only_key = 0 < number <= len(lines) and lines[number - 1].count(":") == 1
    for words, meaning, fix in _PROBLEMS[only_key:]:
        if words in f"{error.context} {error.problem}":
            return number, meaning, fix
    return number, "the line does not fit the lines above", "check the indentation, brackets and quotes"


def explain_line(line: str) -> tuple[str, str] | None:
    """Return what in a line has a meaning in YAML that its author did not intend, and what to write."""
    line = line[:_MAX_LINE]
    if "\t" in line[: len(line) - len(line.lstrip())] or re.match(r" *-\t", line):
        return "a tab indents the line, but YAML allows only spaces", "use spaces"
    if "{{" in line:
        return "'{{' begins a template", "render the template first, for example with helm template"
    if match := _INDICATOR.search(line):
        return f"{match['sign']!r} {_INDICATORS[match['sign']]} in YAML", f'write "{match["text"]}"'
    if match := _TEXT_AFTER_QUOTE.search(line):
        return "text follows a closing quote", f'write "{match["quoted"][1:-1]}{match["rest"]}"'
    if match := _BRACES.search(line):
        return "'{' begins a mapping in YAML", f'write "{match["text"]}"'
    if match := _NO_SPACE.search(line):
        return f"a space is missing after '{match['key']}:'", f"write {match['key']}: and the value"
    if _NO_SPACE_AFTER_DASH.search(line):
        return "a space is missing after '-'", "write '- ' before the item"
    return None


def _candidates(problem: int, context: int, lines: list[str]) -> Iterator[int]:
    """Yield the lines that can be wrong: the parser often notices an error only in a later line."""
    before = next((number for number in range(min(problem - 1, len(lines)), 0, -1) if lines[number - 1].strip()), 0)
    for number in dict.fromkeys((problem, before, context)):
        if 0 < number <= len(lines):
            yield number
