"""Everything that can go wrong in the model, as its caller sees it.

* ModelError
  x PresetError                   another preset, or a repaired one, is needed
    + PresetNotFound              nothing has that name
    + PresetFileMissing           the directory lacks a file
    + PresetFileInvalid           a file is truncated, malformed or does not fit the config
    + PresetDownloadFailed        a hub refused, was not reached, or the disk is full
    + UnsupportedPreset           a well-formed file of a kind that is not served
    + AdapterUnfit                an adapter that this model or this service cannot take
  x SelfTestFailed                answers would depend on what else runs on this machine
  x KernelsUnavailable            native kernels were asked for and cannot be used here
  x RequestInvalid                another request is needed
    + TokenOutOfRange             an id is not in the vocabulary
    + SequenceTooLong             more tokens than a slot holds
"""


class ModelError(Exception):
    """Base of every error that the model raises on purpose. The message is one clear line."""


class PresetError(ModelError):
    """The files cannot be loaded. The message names the file or the tensor and the remedy."""


class PresetNotFound(PresetError):
    """No built-in preset and no path has that name."""


class PresetFileMissing(PresetError):
    """A file that every preset of this kind has is not there."""


class PresetFileInvalid(PresetError):
    """A file is truncated, malformed, or its names and shapes do not fit the config."""


class PresetDownloadFailed(PresetError):
    """A hub refused, could not be reached or sent damaged files, or there was no room for them."""


class UnsupportedPreset(PresetError):
    """The file is well formed but holds an architecture or a format that is not served."""


class AdapterUnfit(PresetError):
    """An adapter is not the one that was named, or there is no place for one like it."""


class SelfTestFailed(ModelError):
    """The programs give other bits in other company here. The message says which, and a remedy."""


class KernelsUnavailable(ModelError):
    """Native kernels were asked for and there are none. The message says why, and a remedy."""


class RequestInvalid(ModelError):
    """The arguments of one call are out of range."""


class TokenOutOfRange(RequestInvalid):
    """A token id is negative or not below the vocabulary size."""


class SequenceTooLong(RequestInvalid):
    """A sequence has more tokens than a slot holds."""
