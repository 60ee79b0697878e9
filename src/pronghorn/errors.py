"""The two ways a pronghorn command can fail, and nothing else.

A message is one sentence: the option or file, what is wrong with it, and the cure. The command line prints it
without a traceback and exits with `exit_code`.
"""


class PronghornError(Exception):
    """Base of every error that pronghorn raises on purpose."""

    exit_code = 1


class InputError(PronghornError):
    """What the user gave (an option, a file, a row) cannot be used; nothing was written. Exit code 2."""

    exit_code = 2


class RunError(PronghornError):
    """The input was fine and the run could not go on (non-finite loss, no gradient, no disk). Exit code 1."""

    exit_code = 1
