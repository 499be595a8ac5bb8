"""API keys, kept as keyed hashes and compared in constant time; sessions of the web page."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable

MAX_SESSIONS = 1000


class ApiKeys:
    """The keys that open a server.

    >>> keys = ApiKeys(["a-long-random-key"])
    >>> keys.opens("a-long-random-key"), keys.opens("another")
    (True, False)
    """

    def __init__(self, keys: Iterable[str]) -> None:
        # Random at each start, so that nobody can compute the hashes that are compared.
        self._secret = secrets.token_bytes(32)
        self._keys = [self._hash(key) for key in keys]
        self._sessions: dict[bytes, None] = {}

    def __bool__(self) -> bool:
        return bool(self._keys)

    def opens(self, key: str) -> bool:
        """Whether it is one of the keys. Every key is compared, whichever fits."""
        hashed = self._hash(key)
        # A list, not a generator: stopping at the first match would tell by its time which key
        # fits.
        return any([hmac.compare_digest(hashed, known) for known in self._keys])

    def new_session(self) -> str:
        """A random token that opens the server until it stops; the oldest give way."""
        token = secrets.token_urlsafe(32)
        self._sessions[self._hash(token)] = None
        # Dicts keep the order of insertion, so the first is the oldest.
        while len(self._sessions) > MAX_SESSIONS:
            del self._sessions[next(iter(self._sessions))]
        return token

    def opens_session(self, token: str) -> bool:
        """Whether a token of ``new_session`` is known. Hashes are looked up, never the token."""
        return self._hash(token) in self._sessions

    def end_session(self, token: str) -> None:
        """Forget a token."""
        self._sessions.pop(self._hash(token), None)

    def _hash(self, key: str) -> bytes:
        return hashlib.blake2b(key.encode(), key=self._secret).digest()
