"""The errors that reach a user, each one line of what happened and one of what to do.

ExportError
├── UsageError          a flag, a path or a combination of them
├── CheckpointError     files, tensors or the configuration of a checkpoint
├── LowerError          the graph is not what the configuration says
├── CompileError        an engine cannot be built
├── ValidationError     a gate failed, or could not be judged
├── NotFiniteError      NaN or infinity where values are to be compared
└── BundleError         a bundle is incomplete, changed or unknown
"""


class ExportError(Exception):
    """What happened, in one line that names it; `hint` says what to do about it."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(ExportError):
    """A flag, a path or a combination of them cannot be meant."""

    exit_code = 2


class CheckpointError(ExportError):
    """The checkpoint's files, tensors or configuration are not what they should be."""

    exit_code = 3


class LowerError(ExportError):
    """The graph is not what the configuration says it should be."""

    exit_code = 4


class CompileError(ExportError):
    """An engine cannot be built."""

    exit_code = 5


class ValidationError(ExportError):
    """A gate failed, or nothing could be compared."""

    exit_code = 6


class NotFiniteError(ExportError):
    """One side of a comparison holds NaN or infinity, so that nothing can be judged."""

    exit_code = 8


class BundleError(ExportError):
    """The bundle is incomplete, was changed, or is of an unknown kind."""

    exit_code = 7
