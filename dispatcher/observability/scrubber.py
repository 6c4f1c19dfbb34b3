"""Making what leaves the node for a support case free of secrets: stricter than what is logged, and slower.

Three nets, each of which would do alone in most cases:

* by structure: a value under a key that sounds like a secret goes, at any depth, also within a text that is JSON itself,
  and within one that is base64 of either;
* by pattern: credentials in free text (`token: x`, `user:pass@host`, `Bearer x`), JSON web tokens, private keys;
* by value: texts that are known to be secret go wherever they stand, as they are or as base64, hex, percent-encoded or
  JSON-escaped. What the first two nets remove becomes known, so it is also removed where nothing points to it.

Invariant: what was handed to `learn`, and is long enough to be told from ordinary words, is in no text that `text` or
`value` returned after that.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final
from urllib.parse import quote, quote_plus, unquote

from dispatcher.observability.redaction import REDACTED, cut_credentials

MIN_SECRET: Final = 6
_MAX_DEPTH: Final = 32
_ANCHOR: Final = 4

_SECRET_KEY = re.compile(
    r"passw|pwd|secret|token|credential|authorization|(^|[_.\-/])auths?$|^auths?([_.\-]|$)|cookie|kubeconfig|dockerconfig"
    r"|(private|api|access|encryption|client|signing)[_.-]?key|(^|[_.\-])key([_.-]?data)?$",
    re.IGNORECASE,
)
_ENVIRONMENT_KEY = re.compile(r"(^|[_.\-])env(ironment|s)?$", re.IGNORECASE)
# Keys of ours that sound like a secret and are none.
_HARMLESS = frozenset({"token_lifetime_s", "max_tokens", "send_credentials", "key"})
_PRIVATE_KEY = re.compile(
    r"-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----.*?(-----END [A-Z ]{0,20}PRIVATE KEY-----|\Z)", re.DOTALL
)
_IN_TEXT: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*"), REDACTED),
    (
        re.compile(
            r"""((?:passw\w{0,20}|pwd|secret\w{0,20}|token|credentials?|authorization|(?:api|access|private)[_.-]?key|\bauth)"""
            r"""(?:\\?["'])?\s{0,8}[:=]\s{0,8})"""
            r"""(?:\\?"(?:[^"\\]|\\.)*?\\?"|'[^']*'|[^\s,;&}"'{\[\\]+)""",
            re.IGNORECASE,
        ),
        rf"\1{REDACTED}",
    ),
    (re.compile(r"(--?(?:password|passwd|token|secret|api-?key)[ =])\S+", re.IGNORECASE), rf"\1{REDACTED}"),
)
_USERINFO = re.compile(r"://[^/\s:@]+:([^/\s@]+)@")
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{12,}={0,2}")


def sounds_secret(key: str) -> bool:
    """Say whether what stands under this key should not be shown."""
    return key not in _HARMLESS and bool(_SECRET_KEY.search(key))


class Scrubber:
    """Removes secrets from texts and from values as JSON has them. `learn` first, everything that is known."""

    def __init__(self) -> None:
        self._secrets: set[str] = set()
        self._forms: dict[str, list[str]] = {}

    def learn(self, secret: str) -> None:
        """Take note of a text that must not be shown. Too short ones are ignored: they are everywhere by chance."""
        secret = secret.strip()
        if len(secret) < MIN_SECRET or secret in self._secrets or secret == REDACTED:
            return
        self._secrets.add(secret)
        for form in set(_forms(secret)):
            if len(form) >= MIN_SECRET:
                kept = self._forms.setdefault(form[:_ANCHOR], [])
                kept.append(form)
                kept.sort(key=len, reverse=True)
        for found in _USERINFO.findall(secret):
            self.learn(found)
            self.learn(unquote(found))

    def learn_variable(self, name: str, value: str) -> None:
        """Learn the value of a variable: by its name where that says enough, else if it is no ordinary word."""
        self.learn_from({name: value})
        is_mixed = any(char.isdigit() for char in value) or not value.isalpha()
        if len(value) >= (8 if is_mixed else 12):
            self.learn(value)

    def learn_from(self, value: Any, *, secret: bool = False, depth: int = 0) -> None:
        """Learn every text below a key that sounds like a secret, in values, in JSON within texts, and in base64."""
        if depth > _MAX_DEPTH:
            return
        if isinstance(value, Mapping):
            for key, item in value.items():
                self.learn_from(item, secret=secret or sounds_secret(str(key)), depth=depth + 1)
        elif isinstance(value, str):
            for found in _USERINFO.findall(value):
                self.learn(found)
            inner = _parse(value)
            if inner is not None:
                self.learn_from(inner, secret=secret, depth=depth + 1)
            elif (decoded := _decode(value)) is not None and depth < 8:
                self.learn_from(decoded, secret=secret, depth=depth + 1)
                if secret:  # registries write "user:password" so
                    self.learn(decoded.partition(":")[2])
            if secret:
                self.learn(value)
        elif isinstance(value, Sequence) and not isinstance(value, bytes):
            for item in value:
                self.learn_from(item, secret=secret, depth=depth + 1)

    def value(self, value: Any, key: str = "", depth: int = 0) -> Any:
        """Return a copy of a value as JSON has them, without secrets."""
        if (
            key
            and (sounds_secret(key) or _ENVIRONMENT_KEY.search(key))
            and value not in (None, "", [], {})
            and not isinstance(value, bool)
        ):
            return REDACTED
        if isinstance(value, str):
            return self._string(value, depth)
        if value is None or isinstance(value, bool | int | float):
            return value
        if depth >= _MAX_DEPTH:
            return REDACTED
        if isinstance(value, Mapping):
            return {self.text(str(name)): self.value(item, str(name), depth + 1) for name, item in value.items()}
        return [self.value(item, depth=depth + 1) for item in value]

    def _string(self, value: str, depth: int) -> str:
        inner = _parse(value) if depth < _MAX_DEPTH else None
        if inner is not None:
            return json.dumps(self.value(inner, depth=depth + 1), ensure_ascii=False)
        return self.text(value)

    def text(self, text: str) -> str:
        """Return a text without secrets. Lines that are JSON objects are treated as values."""
        known = _PRIVATE_KEY.sub(REDACTED, self._known(text))
        return "\n".join(self._line(line) for line in known.split("\n"))

    def _line(self, line: str) -> str:
        if line.startswith("{") and (inner := _parse(line)) is not None:
            return json.dumps(self.value(inner, depth=1), ensure_ascii=False)
        return _BASE64.sub(self._encoded, _cut(line))

    def _known(self, text: str) -> str:
        """Cut out known secrets: one pass, whatever their number."""
        if not self._forms:
            return text
        parts: list[str] = []
        start = at = 0
        last = len(text) - _ANCHOR
        while at <= last:
            for form in self._forms.get(text[at : at + _ANCHOR], ()):
                if text.startswith(form, at):
                    parts += (text[start:at], REDACTED)
                    at += len(form)
                    start = at
                    break
            else:
                at += 1
        return "".join((*parts, text[start:])) if parts else text

    def _encoded(self, match: re.Match[str]) -> str:
        """Look into what may be base64; what hides a secret goes as a whole."""
        text = match[0]
        for _ in range(8):
            decoded = _decode(text)
            if decoded is None:
                return match[0]
            inner = _parse(decoded)
            if inner is not None:
                clean = self.value(inner, depth=1) == inner
            else:
                clean = self._known(_PRIVATE_KEY.sub(REDACTED, _cut(decoded))) == decoded
            if not clean:
                return REDACTED
            text = decoded.strip()
        return REDACTED


def _cut(text: str) -> str:
    text = cut_credentials(text)
    for pattern, replacement in _IN_TEXT:
        text = pattern.sub(replacement, text)
    return text


def _forms(secret: str) -> Iterator[str]:
    """Yield how a secret may be written. Of base64, what does not depend on what stands before and after it."""
    data = secret.encode()
    for ascii_only in (True, False):
        escaped = json.dumps(secret, ensure_ascii=ascii_only)[1:-1]
        yield escaped
        yield json.dumps(escaped)[1:-1]
    yield secret
    yield quote(secret, safe="")
    yield quote(secret)
    yield quote_plus(secret)
    yield data.hex()
    yield data.hex().upper()
    for shift in range(3):
        encoded = base64.b64encode(bytes(shift) + data).decode()
        begin = (shift * 8 + 5) // 6
        end = (shift + len(data)) * 8 // 6
        for form in (encoded[begin:end], encoded[begin:end].replace("+", "-").replace("/", "_")):
            if len(form) >= MIN_SECRET:
                yield form


def _parse(text: str) -> Any:
    """Return the object or list that a text is, None where it is neither."""
    stripped = text.strip()
    if not (stripped.startswith(("{", "[")) and stripped.endswith(("}", "]"))):
        return None
    try:
        found = json.loads(stripped)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict | list) else None


def _decode(text: str) -> str | None:
    """Return what a text says in base64, None where it is none or says nothing that can be read."""
    if not _BASE64.fullmatch(text.strip()):
        return None
    padded = text.strip().rstrip("=").replace("-", "+").replace("_", "/")
    try:
        data = base64.b64decode(padded + "=" * (-len(padded) % 4), validate=True)
        decoded = data.decode()
    except (binascii.Error, ValueError):
        return None
    readable = sum(char.isprintable() or char in "\n\r\t" for char in decoded)
    return decoded if decoded and readable == len(decoded) else None
