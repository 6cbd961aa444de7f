"""What is said where a step is not that of the one batch."""


class InexactWarning(UserWarning):
    """A training step, or the loss of an evaluation, that is not what the one batch would give; the message says which and why.

    ``warnings.simplefilter("error", accumloss.InexactWarning)`` makes it an error.
    """


class InexactError(RuntimeError, InexactWarning):
    """The same, where ``register_with_transformers(verify="error")`` was asked for."""
