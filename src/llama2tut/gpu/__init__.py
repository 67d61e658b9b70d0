"""What makes a GPU fast: fused kernels, CUDA graphs for training and for decoding."""
