"""Every error that a user can cause: one sentence each with what was given, what was expected and what to do."""


class OpdkitError(Exception):
    """Base of the errors that the command line prints without a traceback."""


class RecipeError(OpdkitError, ValueError):
    """A recipe, an override or a method argument is wrong."""


class MethodError(OpdkitError, ValueError):
    """A method's pieces do not fit together; raised when the method is built."""


class DataError(OpdkitError, ValueError):
    """A data set, a prompt or an answer cannot be used."""


class ModelError(OpdkitError, ValueError):
    """A model or tokenizer cannot be loaded, or student and teacher do not fit."""


class RunError(OpdkitError, RuntimeError):
    """A run folder or a checkpoint cannot be used."""


class NonFiniteError(OpdkitError, ArithmeticError):
    """A teacher, a loss or a gradient is NaN or infinite; the offending batch has been saved."""
