"""Whether a server answers, found out in bounded time (floor 4).

TFDS retries a dead connection for minutes and waits for a silent one without end. One question
beforehand, with a deadline, turns both into an error the user can act on.
"""

import threading

PROBE_SECONDS = 10.0


def why_unreachable(url: str) -> str | None:
    """Returns why `url` cannot be fetched now, or None where its server answers.

    Any answer below 500 counts: what the server thinks of the request is for the download to tell.
    Proxies and certificates come from the environment, as they do for the download.
    """
    import requests

    outcome: list[str | None] = []

    def ask() -> None:
        try:
            response = requests.head(url, timeout=PROBE_SECONDS, allow_redirects=True)
        except requests.Timeout:
            outcome.append(f"no answer within {PROBE_SECONDS:g} s")
        except requests.RequestException as error:
            outcome.append(_innermost(error))
        else:
            status = response.status_code
            outcome.append(f"HTTP status {status}" if status >= 500 else None)

    # The timeouts above do not cover looking up a name, and one thread cannot stop another: the
    # question is left behind when its time is up.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS + 1)
    return outcome[0] if outcome else f"no answer within {PROBE_SECONDS:g} s"


def _innermost(error: BaseException) -> str:
    """Returns the text of the error that began it all: requests and urllib3 wrap it in their own."""
    while True:
        wrapped = next((a for a in error.args if isinstance(a, BaseException)), None)
        wrapped = getattr(error, "reason", None) or wrapped or error.__cause__
        if not isinstance(wrapped, BaseException):
            return getattr(error, "strerror", None) or str(error)
        error = wrapped
