"""What the compressor raises when the user can fix it."""


class CompressError(Exception):
    """A recipe, model or budget that cannot be served: what was given, what is possible, the nearest fix."""
