"""What profiles raise when the user can fix it."""


class ProfileError(Exception):
    """A device profile or a measurement that cannot be had: what was given, what is possible, the nearest fix."""
