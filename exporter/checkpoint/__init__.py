"""Read, check and write checkpoints in the Hugging Face layout."""
