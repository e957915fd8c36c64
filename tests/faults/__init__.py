"""Writing that is killed, or whose system calls fail: `make kill-tests COUNT=200`."""
