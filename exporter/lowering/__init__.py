"""From a traced PyTorch graph to ONNX nodes, and from checkpoint tensors to external data."""
