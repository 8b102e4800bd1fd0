"""What compiled artifacts run on: the custom ops of the QDQ form and the modules that hold packed weights."""
