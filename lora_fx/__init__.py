"""LoRA as a compiler pass: adapt any PyTorch model, fold it, export it to ONNX, and prove the result."""

__version__ = "0.1.0.dev0"
