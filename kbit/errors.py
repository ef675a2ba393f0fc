"""What is wrong with a request, in one kind of error: the key, its value, what is allowed."""

from __future__ import annotations


class SpecError(ValueError):
    """A specification that can't exist.

    Attributes:
        key: the key whose value is wrong, as a user writes it.
        value: its value.
        allowed: what would be allowed, in words.
    """

    def __init__(self, key: str, value: object, allowed: str) -> None:
        super().__init__(f"{key}={value!r} is not valid: {allowed}")
        self.key, self.value, self.allowed = key, value, allowed
