"""What a bundle needs to run: sessions, pools, the GPU and the manifest, with no PyTorch."""
