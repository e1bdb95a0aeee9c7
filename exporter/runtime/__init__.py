"""What a bundle needs to run: session, pools, manifest, tokenizer and batching, with no PyTorch."""
