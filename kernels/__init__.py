"""What runs on a device: the op protocol and its backends. Knows nothing of `engine`."""
