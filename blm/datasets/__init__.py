"""Episodes on disk (LeRobotDataset v3.0), their statistics, videos, transforms and mixtures.

Import from the modules. This file imports nothing, so that a policy does not load the video
library.
"""
