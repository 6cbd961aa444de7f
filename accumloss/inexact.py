"""What is said where a step is not that of the one batch."""


class InexactWarning(UserWarning):
    """A training step, or the loss of an evaluation, that is not what the one batch would give; the message says which and why.

    Examples:
        >>> warnings.simplefilter("error", accumloss.InexactWarning)  # makes it an error
    """


class InexactError(RuntimeError, InexactWarning):
    """The same, where ``register_with_transformers(verify="error")`` was asked for.

    Examples:
        >>> accumloss.register_with_transformers(verify="error")
        >>> try:
        ...     output = trainer.train()
        ... except accumloss.InexactError as error:
        ...     print(error)  # not here: this Trainer is exact
        {'train_runtime': ...}
        >>> accumloss.unregister_from_transformers()
    """
