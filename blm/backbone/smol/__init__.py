"""smol: a small pretrained backbone, whose weights are Python packages."""
