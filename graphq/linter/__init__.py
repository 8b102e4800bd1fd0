"""What a consumer runs in integers of an ONNX model: predicted by its profile, and observed."""
