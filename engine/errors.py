"""Typed errors. Each tells the user what to do; the server maps them to HTTP statuses."""

from __future__ import annotations


class RyzansteinError(Exception):
    """Base of every error that this package raises on purpose."""


class InvalidRequest(RyzansteinError):
    """The request can never be served as it is. `param` names the field, `code` the reason."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class Overloaded(RyzansteinError):
    """There is no room now; the same request may succeed after `retry_after` seconds. `reason` is
    one word for statistics."""

    def __init__(self, message: str, *, retry_after: float, reason: str = "queue") -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.reason = reason


class DeadlineExceeded(RyzansteinError):
    """The request's deadline passed before it was served."""


class EngineFailed(RyzansteinError):
    """The engine could not finish the request, through no fault of the request."""


class EngineClosed(EngineFailed):
    """The engine is being closed; the same request may be asked of its next start."""


class DeviceLost(EngineFailed):
    """Whatever ran is lost, with the KV cache. `final` says that nothing will run any more."""

    def __init__(self, message: str, *, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


class ConfigError(RyzansteinError):
    """A setting or a model file is wrong; the message names the field, tensor or key."""
