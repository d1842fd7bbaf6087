"""The files from which a build makes its results."""

from __future__ import annotations

from kvexport.calibrate import Recipe
from kvexport.errors import UsageError
from kvexport.files.identity import FileIdentities
from kvexport.model.checkpoint import Checkpoint


class SourceFiles:
    """The checkpoint's files and the calibration text, which must stay as they are."""

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe) -> None:
        """
        Args:
            checkpoint: the checkpoint to be converted.
            recipe: names the calibration text, which has not been read.
        """
        self._checkpoint = checkpoint
        self._text = FileIdentities([] if recipe.file is None else [recipe.file])

    def require_unchanged(self) -> None:
        """Check that the files are still those that they were.

        Raises:
            CheckpointError: a file of the checkpoint has changed.
            UsageError: the calibration text has changed.
        """
        self._checkpoint.require_unchanged()
        self._text.require_unchanged("the calibration text", UsageError)
