"""The errors that a user can cause or must act on; everything else is a bug of ours and keeps its traceback."""


class ConfigError(ValueError):
    """A setting is missing, mistyped, out of range or contradicts another. Raised before a model is loaded."""


class DataError(ValueError):
    """A file of the user's (prompts, weights, checkpoint) does not hold what it must; names the file and the row."""


class StageError(RuntimeError):
    """A stage of a running step failed (rollout, score, select, learn, sync); names the step and the worker."""
