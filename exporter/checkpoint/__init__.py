"""A checkpoint in the Hugging Face layout: read strictly, matched to the model, and written."""
