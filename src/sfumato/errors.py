"""The errors a user can cause, as one tree; each message says what was wrong, where, and what to do.

SfumatoError
├── BadRequest      exit 2    a setting that cannot be served
│   └── TooLarge    exit 2    one that could be, were it smaller
├── BadCheckpoint   exit 3    a weight file that cannot be trusted or does not fit
├── BadData         exit 4    pictures, captions or recipes that cannot be trained on
└── NoResources     exit 5    disk, memory or a missing optional part
"""


class SfumatoError(Exception):
    """An error with a message fit for the user's eyes and an exit code for the shell."""

    exit_code = 1


class BadRequest(SfumatoError, ValueError):
    """A request or setting that cannot be served.

    Args:
        setting: the name of the setting that is wrong, where it is one.
    """

    exit_code = 2

    def __init__(self, message: str = "", setting: str | None = None) -> None:
        super().__init__(message)
        self.setting = setting


class TooLarge(BadRequest):
    """A request that is right, and more than is served."""


class BadCheckpoint(SfumatoError):
    """A weight file that is damaged, foreign, hostile, or does not fit the network."""

    exit_code = 3


class BadData(SfumatoError):
    """Training data or a recipe that cannot be used."""

    exit_code = 4


class NoResources(SfumatoError):
    """The machine ran out of something, or an optional part is not installed."""

    exit_code = 5


def nearest(name: str, names: list[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest of names, or an empty string."""
    import difflib

    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
