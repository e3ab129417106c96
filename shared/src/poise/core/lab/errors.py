"""What can go wrong in the lab, by exit code of the command line."""


class BadInput(ValueError):
    """The user asked for something that cannot be done (exit code 2). The message is one line and says what to do instead."""


class RunFailed(RuntimeError):
    """A run could not go on (exit code 3). Its state is kept; the message says where and how to resume."""
