"""What calibration keeps of activations."""
