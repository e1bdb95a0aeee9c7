"""What each command does: a pipeline calls stages, and is called by a command or from Python."""
