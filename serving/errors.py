"""Everything raised on purpose.

```
LookalikeError                 str() is one sentence: what, which argument or file, what to do
├── UsageError                 an argument or an option is wrong
│   └── MissingExtra           a package of an optional extra is not installed
├── StorageError               a store did not do what was asked
│   ├── NotFound               no such object, folder or bucket
│   ├── AccessDenied           credentials missing, expired or without the right
│   ├── Changed                the object is no longer the one that was listed
│   ├── TimedOut               the store did not answer in time
│   └── Conflict               a pointer was moved by somebody else
├── FormatError                a file of ours cannot be used as it is
│   ├── UnsupportedVersion     written by a newer or a much older release
│   ├── ChecksumMismatch       the bytes are not those the manifest names
│   └── EmbedderMismatch       made with another embedder than the one at hand
├── ImageRejected              one picture cannot be used; carries a reason
├── TargetMissed               an index cannot keep the promise that was asked of it
└── RunFailed                  a job ended without its result
    ├── GateFailed             what was built is worse than what is published
    ├── LeaseHeld              another run is at work on the same store or index
    └── LeaseLost              this run no longer holds its store or its index
```
"""

from typing import Literal

Reason = Literal[
    "empty",
    "truncated",
    "not_an_image",
    "unsupported_format",
    "too_large",
    "too_small",
    "unreadable",
    "timeout",
]


class LookalikeError(Exception):
    """Base of all errors that are raised on purpose; `exit_code` is what a job ends with."""

    exit_code = 1


class UsageError(LookalikeError):
    """An argument or an option is wrong."""

    exit_code = 2


class MissingExtra(UsageError):
    """A package of an optional extra is not installed."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f'{what} needs packages that are not installed: pip install "lookalike[{extra}]"')


class StorageError(LookalikeError):
    """A store did not do what was asked."""


class NotFound(StorageError):
    """No such object, folder or bucket."""


class AccessDenied(StorageError):
    """Credentials are missing, expired or lack the right."""


class Changed(StorageError):
    """The object is no longer the one that was listed."""


class TimedOut(StorageError, TimeoutError):
    """The store did not answer in time."""


class Conflict(StorageError):
    """A pointer was moved by somebody else since it was read."""


class FormatError(LookalikeError):
    """A file of ours cannot be used as it is."""


class UnsupportedVersion(FormatError):
    """The file was written by a newer or a much older release."""


class ChecksumMismatch(FormatError):
    """The bytes are not those the manifest names."""


class EmbedderMismatch(FormatError):
    """Vectors or files were made with another embedder than the one at hand."""


class ImageRejected(LookalikeError):
    """One picture cannot be used.

    `reason` is one of a small fixed vocabulary, for counting; `message` says what was seen.
    """

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason: Reason = reason
        self.message = message

    def __reduce__(self) -> tuple[type["ImageRejected"], tuple[Reason, str]]:
        """Let the error cross a process boundary."""
        return (ImageRejected, (self.reason, self.message))


class TargetMissed(LookalikeError):
    """An index cannot keep the promise that was asked of it; nothing was published.

    `shortfall` is the share by which it was missed.
    """

    def __init__(self, message: str, shortfall: float = 0.0) -> None:
        super().__init__(message)
        self.shortfall = shortfall


class RunFailed(LookalikeError):
    """A job ended without its result; what was finished is kept."""


class GateFailed(RunFailed):
    """What was built did not pass the gate; what was published before stays."""

    exit_code = 3


class LeaseHeld(RunFailed):
    """Another run is at work on the same store or index."""

    exit_code = 4


class LeaseLost(RunFailed):
    """A run's lease ran out or was taken over: it moves no pointer any more."""
