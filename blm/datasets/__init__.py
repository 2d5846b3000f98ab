"""Episodes on disk (LeRobotDataset v3.0), their statistics and videos, transforms, and mixtures.

Import from the modules; this file loads nothing, so that a policy does not pull in the video library.
"""
