"""What an error of the hub's libraries means: the hub's answer, the network, or a file here."""

import json
from collections.abc import Iterator

from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

REASONS = {
    400: "the hub does not accept the request",
    401: "the hub does not accept the token, or got none: `hf auth login`, HF_TOKEN or --token",
    403: "the token may not write there: make one with write access, or push to a name of yours",
    404: "there is no such repository, or the token does not see it: check the name and the token",
    409: "somebody else changed the repository at the same time; push again",
    412: "somebody else changed the repository at the same time; push again",
    413: "the hub refuses files of this size",
    429: "the hub refuses more requests for now; wait some minutes, then push again",
}


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, what it wraps, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_of_library(error: BaseException) -> bool:
    libraries = {cls.__module__.partition(".")[0] for cls in type(error).__mro__}
    return bool(libraries & {"httpx", "httpx2", "huggingface_hub", "hf_xet"})


def is_of_hub(error: BaseException) -> bool:
    """Whether a library of the hub raised it, a builtin error wraps one of those, or it broke."""
    return any(
        _is_of_library(one) or isinstance(one, ConnectionError | TimeoutError)
        for one in _chain(error)
    ) or _is_answer(error)


def _is_answer(error: BaseException) -> bool:
    """Whether the library itself says with a builtin error that an answer is none."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    where = "" if at is None else str(at.tb_frame.f_globals.get("__name__"))
    return isinstance(error, json.JSONDecodeError) or (
        isinstance(error, ValueError | RuntimeError) and where.startswith("huggingface_hub")
    )


def file_of(error: BaseException) -> str | None:
    """Say which file here could not be read or written; None: it is not that."""
    for one in _chain(error):
        if isinstance(one, OSError) and one.filename and not _is_of_library(one):
            return f"{one.filename}: {one.strerror or one}"
    return None


def asked_to_commit(error: BaseException) -> bool:
    """Whether it was the request for the commit itself that got no answer."""
    for one in _chain(error):
        try:
            path = one.request.url.path  # type: ignore[attr-defined]
        except (AttributeError, RuntimeError):  # the library's word for "no request"
            continue
        if "/commit/" in path:
            return True
    return False


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status that the hub answered; None: there is none."""
    return getattr(getattr(error, "response", None), "status_code", None)


def reason_of(error: BaseException) -> str:
    """Return what went wrong and what to do; may hold what was sent, a token among it."""
    status = status_of(error)
    wrapped = error.__cause__
    if status is None and wrapped is not None and not _is_of_library(error):
        if isinstance(error, ValueError) and (code := status_of(wrapped)) is not None:
            return f"{code}: {error}"  # the library's own words, of front matter for example
        return reason_of(wrapped)  # of one of several uploads
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if status is not None:
        said = getattr(error, "server_message", None)
        own = f" (the hub says: {said})" if isinstance(error, HfHubHTTPError) and said else ""
        known = REASONS.get(status)
        if known is None:
            known = "the hub has a problem of its own; push again later" if status >= 500 else ""  # noqa: PLR2004
        return f"{status}: {known}{own}" if known else f"{status}{own}"
    kind = type(error).__name__
    if "Timeout" in kind:
        return f"the hub did not answer in time ({kind}); push again"
    if _is_answer(error):
        return f"the hub's answer is not one that can be used: {kind}: {error}"
    return f"the connection broke, or there is none: {kind}: {error}; push again"
