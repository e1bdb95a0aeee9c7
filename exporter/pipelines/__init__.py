"""What the product does, one file each: a pipeline calls stages and nothing calls a pipeline but a command."""
