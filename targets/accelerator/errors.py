"""Programs that the accelerator must not be given."""

from targets.errors import TargetError


class ProgramError(TargetError):
    """An instruction stream is damaged, or for another design, or would answer by its timing."""
