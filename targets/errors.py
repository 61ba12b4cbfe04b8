"""What targets raise when the user can fix it."""


class TargetError(Exception):
    """A program, device or artifact that a target cannot serve: what was given, what is possible, the nearest fix."""
