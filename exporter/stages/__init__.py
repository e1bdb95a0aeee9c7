"""The stages of a build, one verb a file."""
