"""The one error of this room that is the user's to mend."""


class DataError(ValueError):
    """Bad input or a bad data set: one line that names the file, line or key, what is wrong with
    it and what to do. `launch` prints it without a traceback and exits 2."""
