"""Errors that a user can mend. The command line prints their message as one line and exits with 1.

Each class is one kind of mistake. A message says what is wrong, where (file, key or option) and
what to do about it. Bugs raise ordinary Python exceptions instead.
"""


class SpeechSSMError(Exception):
    """Base of every error that the user can mend."""


class AudioError(SpeechSSMError):
    """A recording is missing, unreadable, empty, or holds NaN or infinite samples."""


class PromptError(SpeechSSMError):
    """A voice prompt is too short, silent, or otherwise unusable."""


class CorpusError(SpeechSSMError):
    """A corpus folder does not have the layout that its recipe expects."""


class ShardError(SpeechSSMError):
    """A shard or its index is missing, truncated, or could not be written."""


class FingerprintError(SpeechSSMError):
    """Tokens were made by another model than the one that a config names."""


class ConfigError(SpeechSSMError):
    """An option has an unknown, impossible or contradictory value."""


class CheckpointError(SpeechSSMError):
    """Weights are missing, truncated, or of another shape or stage."""
