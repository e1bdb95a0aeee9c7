"""The commands: each turns its options into a configuration and makes one call. Heavy imports are inside them."""
