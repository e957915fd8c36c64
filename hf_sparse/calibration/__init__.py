"""Data on its way through a model: windows, labels, recorded calls, statistics of inputs."""
