"""The one exception for mistakes that the user can mend."""


class UserError(Exception):
    """One sentence for the person: where, what was found, what is allowed, what to do. The command line prints it and exits with 2."""
