"""The Triton twins of the operators. Nothing here is imported before a kernel runs."""
