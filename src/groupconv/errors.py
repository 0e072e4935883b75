"""The errors that groupconv raises for what a user can put right."""


class GroupConvError(Exception):
    """Base of every error that groupconv raises on purpose."""


class ArgumentError(GroupConvError, ValueError, RuntimeError):
    """An argument breaks a rule; the message names argument, value, rule and legal values.

    PyTorch raises ``ValueError`` from constructors and ``RuntimeError`` from functions for the
    same mistakes; being both, it is caught wherever PyTorch's would be.
    """


class DataError(GroupConvError):
    """A file, folder or batch of data can't be used."""


class BudgetError(GroupConvError):
    """No choice of structures meets the budget."""


class ExportError(GroupConvError):
    """A format can't hold a network, or a file doesn't compute what the network does."""


class BusyError(GroupConvError):
    """Others use the machine so much that a measured time would say little."""
