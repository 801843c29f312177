"""The errors that a person reads. Anything else that comes up is a bug and keeps its traceback.

RepsepError          exit code 1: it failed, and the message says what to do
  UsageError         exit code 2: what was asked for cannot be
  StorageError       exit code 1: an object store or a folder said no
  StoppedError       exit code 130: somebody pressed Ctrl-C or sent SIGTERM
"""


class RepsepError(Exception):
    """A failure explained in one paragraph: the key or URI, and what to do."""

    exit_code = 1


class UsageError(RepsepError):
    """A config, an argument or a combination of them that cannot be served."""

    exit_code = 2


class StorageError(RepsepError):
    """Storage that is missing, refuses, or does not answer."""


class StoppedError(RepsepError):
    """Stopped on request, at a point from which the same command goes on."""

    exit_code = 130
