"""Errors that users meet: each says what was expected, what came, and the remedy, in one line.

Everything that a user can mend derives from `InputError`; the command line turns those into one line and exit code 2.
"""


class SmpEnsembleError(Exception):
    """Base of every error that this package raises on purpose."""


class InputError(SmpEnsembleError, ValueError):
    """Bad input: an option, a file or an array that the user can mend."""


class DataError(InputError):
    """A data set that cannot be read as described: missing folder, broken image, class id outside the range."""


class ConfigError(InputError):
    """An option or a combination of options that makes no sense: unknown name, wrong type, conflicting values."""


class NetworkError(InputError):
    """A network that cannot take part: it has an activation, an auxiliary head, or parts that do not fit."""


class NothingFoundError(InputError):
    """A query that found no snapshot; the message says what was searched, where, and what would match."""


class LeakError(InputError):
    """Members would be scored on images that they were trained on."""


class ScheduleError(InputError):
    """Training is set up so that a schedule or its snapshots cannot be right: a second scheduler, no validation."""


class StorageError(SmpEnsembleError):
    """Nothing more can be written: the disk or the quota is full, or it has become read-only."""


class IntegrityError(SmpEnsembleError):
    """A stored artifact is not what was written: names the file, the expected and the found SHA-256."""


class DeliveryError(SmpEnsembleError):
    """The tracking server did not take what was handed to it; the spool still holds it."""


class UndeliveredError(DeliveryError):
    """A tracking server that is away: all is done that can be, and waits on local disk for `smp-ensemble sync`."""


class TrackingError(SmpEnsembleError):
    """The tracking server does not answer, and nothing can begin without it."""


class TrainingError(SmpEnsembleError):
    """A training that cannot go on: no room on the disk, no memory, a loss that is no number; what was done is kept."""


class DivergedError(TrainingError):
    """A training whose loss or weights are no numbers any more: going on would only repeat it."""


class Interrupted(KeyboardInterrupt):
    """A training that was told to stop, by Ctrl-C or the system, and did so after its step.

    Args:
        message: Where it stopped.
        signal_number: What it was told by.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number
