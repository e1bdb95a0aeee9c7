"""The errors that reach a user: one line about what happened, and one about what to do.

ExportError
├── UsageError          a flag, a path or a combination of them is invalid
├── CheckpointError     files, tensors or the configuration of a checkpoint are invalid
├── LowerError          the graph does not match the configuration
├── CompileError        an engine cannot be built
├── ValidationError     a gate failed, or nothing could be compared
├── NotFiniteError      values to compare are NaN or infinite
└── BundleError         a bundle is incomplete, modified or of an unknown kind
"""


class ExportError(Exception):
    """An error whose message says what happened in one line; `hint` says what to do about it."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(ExportError):
    """A flag, a path or a combination of them is invalid."""

    exit_code = 2


class CheckpointError(ExportError):
    """The checkpoint's files, tensors or configuration are invalid."""

    exit_code = 3


class LowerError(ExportError):
    """The graph does not match the configuration."""

    exit_code = 4


class CompileError(ExportError):
    """An engine cannot be built."""

    exit_code = 5


class ValidationError(ExportError):
    """A gate failed, or nothing could be compared."""

    exit_code = 6


class NotFiniteError(ExportError):
    """One side of a comparison holds NaN or infinity, so nothing can be compared."""

    exit_code = 8


class BundleError(ExportError):
    """The bundle is incomplete, was modified, or is of an unknown kind."""

    exit_code = 7
