"""Backends of a session: ONNX Runtime on CPU or CUDA, and TensorRT engines."""
