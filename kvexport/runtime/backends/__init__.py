"""Backends: ONNX Runtime on the CPU and on CUDA, and TensorRT engines."""
