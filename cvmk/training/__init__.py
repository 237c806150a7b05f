"""The training loop and everything around it. `pipeline.train` is what the command line calls."""
