"""The result of a validation: its data, and its JSON, HTML and JUnit forms."""
