"""What a validation found: the data, and its JSON, HTML and JUnit forms."""
