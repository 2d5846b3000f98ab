"""Exported policies: run the graphs of `blm export` with onnxruntime or OpenVINO, without torch.

Import from the modules. This room needs NumPy, tokenizers, and one of the two runtimes; Pillow only
for pictures that have to be resized.
"""
