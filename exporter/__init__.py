"""The application: from a checkpoint to a bundle."""
