"""What `export.py` writes and reads: diffusers, ONNX, safetensors, and the model card."""
