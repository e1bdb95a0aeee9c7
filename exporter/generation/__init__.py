"""Text from a bundle: tokenizer, scheduler, sampling. No PyTorch here."""
