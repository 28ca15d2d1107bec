"""Hypothesis strategies for names and for hostile texts."""

from __future__ import annotations

import string

from hypothesis import strategies as st

LETTERS = string.ascii_lowercase
ALPHANUMERIC = LETTERS + string.digits

labels = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,12}[a-z0-9])?", fullmatch=True)
last_labels = st.from_regex(r"[a-z][a-z0-9]{0,8}", fullmatch=True)
host_names = st.builds(lambda front, last: ".".join([*front, last]), st.lists(labels, max_size=4), last_labels)
wildcard_names = st.builds("*.{}.{}".format, labels, host_names)
dns_texts = st.one_of(host_names, wildcard_names)

segments = st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,15}", fullmatch=True)
paths = st.lists(segments, max_size=4)
spiffe_texts = st.builds(lambda domain, path: "/".join([f"spiffe://{domain}", *path]), host_names, paths)
https_texts = st.builds(lambda host, path: "/".join([f"https://{host}", *path]), host_names, paths)
uri_texts = st.one_of(spiffe_texts, https_texts)

ip_texts = st.ip_addresses().map(str).filter(lambda text: not text.startswith("::ffff:"))
local_parts = st.from_regex(r"[A-Za-z0-9#$&'+/=?^_|~-]{1,10}(\.[A-Za-z0-9#$&'+/=?^_|~-]{1,10}){0,3}", fullmatch=True)
email_texts = st.builds("{}@{}".format, local_parts, host_names)
words = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,12}[a-z0-9])?", fullmatch=True)

duration_texts = st.builds("{}{}".format, st.integers(1, 5000), st.sampled_from(["s", "m", "h"]))

HOSTILE = f"""
* *. . .. *.com *.*.example.com a*.example.com bücher.example xn--bcher-kva.example example.com. -a.example a..b
{"a" * 64}.example 10.0.0.1 ::1 010.0.0.1 ::ffff:10.0.0.1 fe80::1%eth0 -5m 0s 0 1e9h inf ٣h 99999999999
spiffe://a/../b https://user@host/ https://host:1/ https://host/?q http://[::1]/ a@b@c.example a@*.example.com a%b@c.example
"""
hostile_texts = st.one_of(
    st.text(max_size=40),
    st.text(alphabet="\x00\x01\t\n\r\x1b\x7f\x85\u2028\u202e\ufeff\ud800*.,-{}/\\'\" %", max_size=20),
    st.sampled_from([*HOSTILE.split(), '"a b"@c.example', "x" * 40_000]),
    st.just(",".join(f"n{number}.example" for number in range(1000))),
)


def fields(*texts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Draw one text, or several separated by commas, as in a list attribute."""
    one = st.one_of(*texts)
    return st.one_of(one, st.lists(one, min_size=1, max_size=5).map(",".join))
