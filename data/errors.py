"""The errors of this room that are the user's to mend."""


class DataError(ValueError):
    """Bad input or a bad data set: one line that names the file, line or key, what is wrong with
    it and what to do. `launch` prints it without a traceback and exits 2."""


class Resumable(DataError):
    """An error of `prepare` after which the finished units are of use: the next run goes on from
    them."""
