"""The program of every NPU without an NPU: compile it, read it, say what it costs."""
