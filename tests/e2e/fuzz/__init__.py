"""Random inputs: good files with a few random edits, random chat templates and random arguments."""
